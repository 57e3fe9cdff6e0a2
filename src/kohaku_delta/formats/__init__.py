"""File formats: safetensors, parquet and file hashes. Reading is bounded; the same content gives the same bytes."""
