"""What rows are: each kind of data in a file of its own."""
