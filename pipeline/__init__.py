"""The four stages, the receipts between them, and their order."""
