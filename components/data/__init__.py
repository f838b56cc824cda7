"""Image collections in, parquet shards out, and which rows each training step reads."""
