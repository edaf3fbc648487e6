from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_plasticity.tracking.system_metrics import Machine, MachineSampler, file_name, prefix


def test_a_machine_says_what_it_does(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    sum(i * i for i in range(300_000))  # something to see
    reading = machine.read()
    assert set(reading) == {
        "cpu_utilization_percentage",
        "system_memory_usage_megabytes",
        "system_memory_usage_percentage",
        "process_memory_usage_megabytes",
        "disk_available_megabytes",
        "network_receive_megabytes",
        "network_transmit_megabytes",
    }
    assert 0 <= reading["cpu_utilization_percentage"] <= 100
    assert 0 < reading["system_memory_usage_percentage"] < 100
    assert 5 < reading["process_memory_usage_megabytes"] < reading["system_memory_usage_megabytes"] * 2
    assert reading["network_receive_megabytes"] >= 0


def test_the_names_are_those_that_mlflow_draws() -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    names: set[str] = set()
    for monitor in (CPUMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        names |= set(monitor.aggregate_metrics())
    assert names <= set(Machine(Path("/")).read())


def test_reading_is_cheap(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    began = time.process_time()
    for _ in range(50):
        machine.read()
    assert (time.process_time() - began) / 50 < 0.01, "seconds of CPU time, once a second"


class Nvml:
    """NVIDIA's library for two GPUs, of which the second does not tell its power."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver/library version mismatch")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-a": 0, "GPU-b": 1}[uuid]

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> Any:
        return SimpleNamespace(gpu=90 - gpu)

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:
        return SimpleNamespace(used=40e9, total=80e9)

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        if gpu:
            raise self.NVMLError("not supported")
        return 350_000

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: int) -> int:
        return 700_000


def test_gpus_are_read_in_the_order_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())  # type: ignore[arg-type]
    reading = Machine(tmp_path, ["GPU-b", "GPU-a"]).read()
    assert {name: value for name, value in reading.items() if name.startswith("gpu")} == {
        "gpu_0_utilization_percentage": 89,
        "gpu_0_memory_usage_megabytes": 40_000,
        "gpu_0_memory_usage_percentage": 50,
        "gpu_1_utilization_percentage": 90,
        "gpu_1_memory_usage_megabytes": 40_000,
        "gpu_1_memory_usage_percentage": 50,
        "gpu_1_power_usage_watts": 350,
        "gpu_1_power_usage_percentage": 50,
    }


@pytest.mark.parametrize(("library", "said"), [(None, "nvidia-ml-py"), (Nvml(broken=True), "version mismatch")])
def test_without_the_library_gpus_are_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, library: Any, said: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    reading = Machine(tmp_path, ["GPU-a"]).read()
    assert "cpu_utilization_percentage" in reading
    assert not [name for name in reading if name.startswith("gpu")]
    (record,) = caplog.records
    assert said in record.getMessage()


def test_a_sampler_gives_means_and_starts_over() -> None:
    values = iter(range(100))
    taken = threading.Event()

    def read() -> dict[str, float]:
        value = next(values)
        if value == 3:
            taken.set()
        return {"a": float(value)} | ({"b": 7.0} if value == 0 else {})

    with MachineSampler(read, interval=0.001) as sampler:
        assert taken.wait(10)
        first = sampler.take()
    assert first["b"] == 7.0
    assert first["a"] >= 1.5
    later = sampler.take()["a"]
    assert later > first["a"]
    assert sampler.take()["a"] > later, "read on demand where no time has passed"


def test_a_machine_that_cannot_be_read_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    def refuse(*_: object) -> Any:
        raise PermissionError("no /proc here")

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    monkeypatch.setattr(psutil, "net_io_counters", refuse)
    reading = Machine(tmp_path / "gone").read()
    assert set(reading) <= {"cpu_utilization_percentage", "network_receive_megabytes", "network_transmit_megabytes"}


def test_several_hosts_have_files_and_names_of_their_own() -> None:
    assert (file_name("a", ["a", "a"]), prefix("a", ["a", "a"])) == ("system.jsonl", "system/")
    assert (file_name("b", ["a", "b"]), prefix("b", ["a", "b"])) == ("system-b.jsonl", "system/b/")
