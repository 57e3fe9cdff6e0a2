"""Checkpoint files: the safetensors stream, the names of tensors, merge, LoKr file, bake and export."""
