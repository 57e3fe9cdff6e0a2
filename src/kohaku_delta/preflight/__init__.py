"""Whether a host can make a recipe, before anything is spent: what it has, what the recipe needs, the table of both, and the plan for another host."""
