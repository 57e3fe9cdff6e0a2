"""Invariant: everything under data/ is a pure function of this package: no clock, no unseeded draw, no order that a
file system chose.

    python tools/make_miniature --help          (or: make miniature-data)

Order of the rooms: words → posts → drawing → database, tars, tokenizer; then scenes → autoencoder, painter →
checkpoints; references; pins.
"""
