"""The room of choices: which posts are trained on, with which captions."""
