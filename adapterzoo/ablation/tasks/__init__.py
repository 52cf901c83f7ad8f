"""Tasks: what the cells of a grid are run on."""
