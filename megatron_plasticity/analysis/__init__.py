"""Looking at trained models: linear probes, attention matrices and maps, overfitting, and the statistics of a study."""
