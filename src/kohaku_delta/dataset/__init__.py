"""The training dataset: which posts are used, their captions, and statistics about both."""
