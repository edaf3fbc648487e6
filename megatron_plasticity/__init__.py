"""Weight decay and language-model plasticity: pretrain over a grid of λ, fine-tune, measure, report."""

__version__ = "0.1.0"
