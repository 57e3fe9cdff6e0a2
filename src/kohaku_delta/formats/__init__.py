"""File formats: safetensors, parquet and file hashes. Reading is bounded; writing gives the same bytes for the same content."""
