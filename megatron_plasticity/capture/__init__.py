"""Activations of a model by canonical name: which points there are, how to record them, where they are kept."""
