"""Which tensors decay, and how the learning rate moves."""
