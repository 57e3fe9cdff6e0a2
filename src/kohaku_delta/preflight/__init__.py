"""Host checks before a build: what the host has, what the recipe needs, and a plan for another host."""
