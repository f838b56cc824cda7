"""What a dataset is: pixels, shards, rows in their order, and which of them each training step reads."""
