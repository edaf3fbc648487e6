"""Which GPUs the runs of a study see."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_plasticity.errors import UserError
from megatron_plasticity.study.backends import local
from megatron_plasticity.study.backends.local import LocalBackend
from megatron_plasticity.study.plan import plan_study
from tests.study.small import small_study


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_visible_devices", lambda: ("0", "1"))
    monkeypatch.setattr(local, "worker_context", lambda *_, **__: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Running:
    """A process that does not end."""

    exitcode = None


@pytest.mark.parametrize(("device", "seen"), [("cpu", ["", ""]), ("auto", ["0", "1"])])
def test_a_study_on_the_cpu_sees_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, seen: list[str]) -> None:
    """Analyses take the GPU that they see: all slots would meet on the first."""
    started: list[dict[str, str]] = []

    def start(*_: object, environment: dict[str, str], **__: object) -> Running:
        started.append(environment)
        return Running()

    monkeypatch.setattr(local, "start_worker", start)
    study = small_study(tmp_path, {"base": {"device": device}, "resources": {"slots": 2}})
    backend = LocalBackend.of(study)
    cells = plan_study(study, "h").cells
    assert len(backend.start(cells)) == 2, "as many as there are slots"
    assert backend.free() == 0
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in started] == seen


def test_more_slots_than_gpus_are_refused(tmp_path: Path) -> None:
    study = small_study(tmp_path, {"base": {"device": "auto"}, "resources": {"slots": 2, "processes_per_run": 2}})
    with pytest.raises(UserError, match="2 slots of 2 processes need more than the 2 GPUs"):
        LocalBackend.of(study)
