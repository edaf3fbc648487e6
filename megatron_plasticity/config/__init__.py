"""The typed config tree: what can be said about a run, how it is read, and how it is hashed."""
