"""The utilisation of a GPU is that of the work done: by the lengths of the texts, and of whole models only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_plasticity.models.sizes import parameter_count, training_flops
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.training.batches import StepBatch
from megatron_plasticity.training.callbacks import TrainingMetrics
from megatron_plasticity.training.loop import StepOutcome
from tests.training.programs import MODEL, recipe

SECONDS = 2.0


def row_of(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], adapters: object = None) -> dict[str, float]:
    """What is written of two steps on texts of these lengths, on an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    grid = SimpleNamespace(device=torch.device("cuda"), size=1, is_main=True, sum=lambda value: value)
    groups = SimpleNamespace(weight_decay=0.1)
    settings = recipe(0)
    engine: Any = SimpleNamespace(
        model=SimpleNamespace(config=MODEL), grid=grid, groups=groups, recipe=settings, adapters=adapters, gradient_norm=1.0
    )
    rows: list[dict[str, float]] = []
    metrics = TrainingMetrics(engine, 2, 2, lambda step, row: rows.append(dict(row)), NoProgress())
    batch = StepBatch([], sum(lengths), sum(lengths), sum(length**2 for length in lengths), [])
    for step in (1, 2):
        metrics.after_step(StepOutcome(step, 0.1, torch.tensor(1.0), batch, SECONDS))
    return rows[0]


def test_attention_counts_over_the_length_of_each_text(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (3, 5, 8)
    multiplied = parameter_count(MODEL).non_embedding + MODEL.vocab_size * MODEL.hidden_size
    flops = sum(6 * multiplied * length + 12 * MODEL.layers * MODEL.hidden_size * length**2 for length in lengths)
    assert training_flops(MODEL, 16, 9 + 25 + 64) == flops
    row = row_of(monkeypatch, lengths)
    assert row["train/mfu"] == pytest.approx(flops / SECONDS / 989e12)
    assert row["train/tokens_per_second"] == pytest.approx(16 / SECONDS)
    assert row_of(monkeypatch, (16,))["train/mfu"] > row["train/mfu"], "one long text costs more than three short ones"


def test_adapters_have_no_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of frozen weights are not computed, so the figure of a whole model would be too high."""
    assert "train/mfu" not in row_of(monkeypatch, (16,), adapters=object())
