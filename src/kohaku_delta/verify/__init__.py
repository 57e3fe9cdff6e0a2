"""Checks of a build: audit, replay, comparison of files, tensors and builds."""
