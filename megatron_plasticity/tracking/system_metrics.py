"""What a machine does while it trains: CPU, memory, disk, network and GPUs, under the names that MLflow's charts know.

They go into files of their own beside `metrics.jsonl`, one of each host, in the same format: what a machine happened to do is no
result, and two runs that agree in everything else differ in it.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

PREFIX = "system/"
FILES = "system*.jsonl"
SECONDS_BETWEEN_SAMPLES = 1.0

_MEGABYTE = 1e6
_log = logging.getLogger(__name__)

Reading = dict[str, float]


def file_name(host: str, hosts: Sequence[str]) -> str:
    """Where `host` writes: `system.jsonl`, or `system-HOST.jsonl` if it is one of several."""
    return "system.jsonl" if len(set(hosts)) == 1 else f"system-{host}.jsonl"


def prefix(host: str, hosts: Sequence[str]) -> str:
    """What the names of the metrics of `host` begin with."""
    return PREFIX if len(set(hosts)) == 1 else f"{PREFIX}{host}/"


class Machine:
    """Reads the state of this machine. What cannot be read is left out: nothing here may stop a run."""

    def __init__(self, folder: Path, gpus: Sequence[str] = ()) -> None:
        """`folder` is on the disk that is looked at; `gpus` are the UUIDs of the GPUs, as `GPU-…`."""
        import psutil

        self._psutil, self._folder = psutil, folder
        self._process = psutil.Process()
        self._received, self._sent = self._traffic()
        self._nvml, self._gpus = _open_gpus(gpus)
        with suppress(OSError, psutil.Error):
            psutil.cpu_percent()  # the first call only starts the clock

    def read(self) -> Reading:
        """The state now; the utilisation of the CPU is its mean since the last call. Percentages are of the whole machine."""
        reading: Reading = {}
        for part in (self._cpu, self._memory, self._disk, self._network):
            with suppress(OSError, self._psutil.Error):
                reading |= part()
        for index, gpu in enumerate(self._gpus):
            reading |= self._gpu(index, gpu)
        return reading

    def _cpu(self) -> Reading:
        return {"cpu_utilization_percentage": self._psutil.cpu_percent()}

    def _memory(self) -> Reading:
        memory = self._psutil.virtual_memory()
        return {
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "process_memory_usage_megabytes": self._process.memory_info().rss / _MEGABYTE,
        }

    def _disk(self) -> Reading:
        disk = self._psutil.disk_usage(str(self._folder))
        return {"disk_available_megabytes": disk.free / _MEGABYTE}

    def _network(self) -> Reading:
        received, sent = self._traffic()
        return {
            "network_receive_megabytes": received - self._received,
            "network_transmit_megabytes": sent - self._sent,
        }

    def _traffic(self) -> tuple[float, float]:
        """Megabytes received and sent since the machine started."""
        try:
            counters = self._psutil.net_io_counters()
        except OSError:
            return 0.0, 0.0
        return counters.bytes_recv / _MEGABYTE, counters.bytes_sent / _MEGABYTE

    def _gpu(self, index: int, gpu: Any) -> Reading:
        nvml, reading = self._nvml, {}
        with suppress(nvml.NVMLError):
            reading[f"gpu_{index}_utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
        with suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
            reading[f"gpu_{index}_memory_usage_megabytes"] = memory.used / _MEGABYTE
            reading[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
        with suppress(nvml.NVMLError):
            watts = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
            reading[f"gpu_{index}_power_usage_watts"] = watts
            reading[f"gpu_{index}_power_usage_percentage"] = 1e5 * watts / nvml.nvmlDeviceGetEnforcedPowerLimit(gpu)
        return reading


class MachineSampler:
    """Reads a machine once a second in the background, and gives the means. Use it in a `with` statement."""

    def __init__(self, read: Callable[[], Reading], interval: float = SECONDS_BETWEEN_SAMPLES) -> None:
        """`interval` is in seconds."""
        self._read, self._interval = read, interval
        self._sums: defaultdict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def take(self) -> Reading:
        """The mean of each quantity since the last call, or since the beginning; read now if there was no time yet."""
        if not self._sums:
            self._sample()
        with self._lock:
            means = {name: sum(values) / len(values) for name, values in self._sums.items()}
            self._sums.clear()
        return means

    def __enter__(self) -> MachineSampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(5.0)  # a driver that hangs must not hold up the end of a run

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        reading = self._read()
        with self._lock:
            for name, value in reading.items():
                self._sums[name].append(float(value))


def _open_gpus(uuids: Sequence[str]) -> tuple[Any, list[Any]]:
    """NVIDIA's management library and a handle of each GPU; no handles where either is missing."""
    if not uuids:
        return None, []
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return nvml, [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
    except ImportError:
        _log.warning("the utilisation of the GPUs is not recorded: `pip install nvidia-ml-py` brings what reads it")
    except Exception as error:  # the library's errors are defined in itself; whatever it says, training goes on
        _log.warning("the utilisation of the GPUs is not recorded: NVML says %s", error)
    return None, []
