"""The comparison of studies: does the best λ move with tokens per parameter, with the family of models, with their size?"""

from megatron_plasticity.study.report.comparison.page import write_comparison

__all__ = ["write_comparison"]
