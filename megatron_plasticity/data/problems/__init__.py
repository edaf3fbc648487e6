"""Procedural problems, one module per family; `registry.py` splits them into a train and a test side."""
