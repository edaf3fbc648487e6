"""Text and tokens, and the order in which a run consumes them."""
