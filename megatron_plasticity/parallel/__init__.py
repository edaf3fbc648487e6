"""The grid of processes. Modules of the model know nothing else of the cluster."""
