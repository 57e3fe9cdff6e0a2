"""SDXL itself: tensor names, model loading, diffusers layout and CLIP tokenizer."""
