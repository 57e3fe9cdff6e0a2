"""Generates data/, the miniature's inputs: a pure function of this package, without clock, unseeded random numbers or
the file system's order.

    python tools/make_miniature --help          (or: make miniature-data)

Order of the modules: words → posts → drawing → database, tars, tokenizer; then scenes → autoencoder,
text_encoder_training, unet_training → checkpoints; references; pins.
"""
