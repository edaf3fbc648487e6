"""The process grid: who this process is, and sums over all processes.

Today the grid has one axis, data. It is given to whatever needs it; nothing reads ranks from a global.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed

from megatron_plasticity.errors import UserError


@dataclass(frozen=True)
class ProcessGrid:
    """Position of this process, 0-based, and the number of processes, along the data axis."""

    data_rank: int
    data_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the person."""
        return self.data_rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of `tensor` over all processes, in place; every process must call it."""
        if self.data_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process; every process must call it."""
        if self.data_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.data_size > 1:
            torch.distributed.barrier()


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process. Raises UserError if CUDA is asked for and absent."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "device: cuda was asked for, but torch sees no CUDA device; use device=cpu, or install a CUDA build of torch"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def process_grid(device: torch.device) -> Iterator[ProcessGrid]:
    """Join the process group that a launcher has prepared (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or form one of a
    single process without a launcher, and leave it at the end."""
    if device.type == "cpu":
        # Before DeepSpeed is imported: it would otherwise look for accelerators, and choose one that we do not run on.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.comm
    import deepspeed.comm.torch

    if device.type == "cpu":
        # DeepSpeed's shared-memory collectives take 45 s to compile and leak 66 MiB of /dev/shm per rank and launch; gloo does
        # the same work. `deepspeed.comm.torch` as an attribute is the real torch, hence sys.modules.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    else:
        torch.cuda.set_device(device)

    launched = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, launcher or not
    with tempfile.TemporaryDirectory(prefix="megatron-plasticity-") as folder:
        deepspeed.comm.init_distributed(
            dist_backend="gloo" if device.type == "cpu" else "nccl",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=30),
            **({} if launched else {"init_method": f"file://{Path(folder) / 'rendezvous'}", "rank": 0, "world_size": 1}),
        )
        try:
            yield ProcessGrid(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
        finally:
            # Through DeepSpeed, which otherwise believes that it is still initialised when the next run of this process starts.
            deepspeed.comm.destroy_process_group()
