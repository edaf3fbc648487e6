"""Which GPUs the runs of a study see."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_plasticity.study import runner
from megatron_plasticity.study.plan import plan_study
from tests.study.small import small_study


@pytest.mark.parametrize(("device", "seen"), [("cpu", ["", ""]), ("auto", ["0", "1"])])
def test_a_study_on_the_cpu_sees_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, seen: list[str]) -> None:
    """Analyses take the GPU that they see: all slots would meet on the first."""
    monkeypatch.setattr(runner, "_visible_devices", lambda: ("0", "1"))
    monkeypatch.setattr(runner, "worker_context", lambda *_, **__: None)
    started: list[dict[str, str]] = []
    monkeypatch.setattr(runner, "start_worker", lambda *_, environment, **__: started.append(environment))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study = small_study(tmp_path, {"base": {"device": device}, "resources": {"slots": 2}})
    slots = runner._Slots.of(study)
    cell = next(cell for cell in plan_study(study, "h").cells if cell.kind == "attention")
    for slot in range(2):
        slots.start(slot, cell)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in started] == seen
