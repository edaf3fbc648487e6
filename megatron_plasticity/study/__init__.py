"""Studies: a grid of runs, the runner that does them, and the report on what came out."""
