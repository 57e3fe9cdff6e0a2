"""Sample pictures and held-out loss of base and final model."""
