"""The commands of `kohaku-delta`, one module per command; and the base class of the stages."""
