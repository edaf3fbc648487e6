"""The tasks that models are fine-tuned on and asked."""
