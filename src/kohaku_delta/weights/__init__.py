"""Checkpoint files: merge, LoKr file, bake and export to diffusers."""
