"""What SDXL is, apart from any training: its tokenizer."""
