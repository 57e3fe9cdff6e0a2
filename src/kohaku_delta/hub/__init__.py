"""Pins, the mirror, and the list of verified inputs."""
