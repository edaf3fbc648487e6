"""The report of a study: one self-contained page with CSV and JSON beside it."""

from megatron_plasticity.study.report.page import write_report

__all__ = ["write_report"]
