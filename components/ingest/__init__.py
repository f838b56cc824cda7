"""Where images come from, and how they become a dataset: listing, decoding, remembering, packing."""
