"""Training: one loop over a DeepSpeed engine, for pretraining and fine-tuning alike."""
