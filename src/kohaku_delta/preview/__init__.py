"""What the training changed, for a person's eyes and as one number."""
