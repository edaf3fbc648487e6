"""The process grid: who this process is on the axes pipeline × data × tensor, and what passes between processes.

It is made once per run and given to whatever needs it; nothing reads ranks from a global. The tensor axis runs fastest, so that
tensor-parallel ranks are neighbours on one node; the pipeline axis runs slowest. The order is DeepSpeed's topology's.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.parallel.liveness import Liveness, Patience
from megatron_plasticity.parallel.tensor import SINGLE, TensorRanks

_SENT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


@dataclass(frozen=True)
class ProcessGrid:
    """Position of this process, 0-based, and the number of processes, along each axis."""

    data_rank: int
    data_size: int
    device: torch.device
    stage: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tensor: TensorRanks = SINGLE
    deepspeed: Any = field(default=None, repr=False, compare=False)
    """DeepSpeed's PipelineParallelGrid, which it calls `mpu`; None without model parallelism."""
    liveness: Liveness = field(default_factory=Liveness, repr=False, compare=False)
    """Whether the other processes still live; told where this one gets on."""

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.data_size * self.parallel.model_parallel_size

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the person."""
        return self.data_rank == 0 and self.stage == 0 and self.tensor.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.parallel.pipeline - 1

    @property
    def reports_loss(self) -> bool:
        """Whether this process stands for its data-parallel rank where losses are summed: exactly one process of each does."""
        return self.is_last_stage and self.tensor.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over all processes, in place; every process must call it."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process; every process must call it."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            torch.distributed.barrier()

    def from_main(self, value: Any) -> Any:
        """What the main process gives here, on every process; all must call it. `value` is of plain Python types."""
        values = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: Any) -> list[Any] | None:
        """What every process gives here, by rank, on the main process; None on the others. `value` is of plain Python types."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else None
        torch.distributed.gather_object(value, values)
        return values

    def to_main(self, tensor: Tensor | None, stage: int) -> Tensor | None:
        """Bring a tensor from the first process of a pipeline stage to the main process, which returns it; others return None.

        Every process may call it; all but these two do nothing. The tensor, of floats or int64, has at most seven dimensions.
        """
        if stage == 0:
            return tensor if self.is_main else None
        if self.is_main:
            source = stage * self.data_size * self.tensor.size
            header = torch.zeros(9, dtype=torch.int64, device=self.device)
            torch.distributed.recv(header, src=source)
            dtype, dimensions, *shape = header.tolist()
            received = torch.empty(shape[:dimensions], dtype=_SENT_TYPES[dtype], device=self.device)
            torch.distributed.recv(received, src=source)
            return received
        if self.stage == stage and self.data_rank == 0 and self.tensor.rank == 0:
            assert tensor is not None, "this process holds the tensor"
            header = torch.zeros(9, dtype=torch.int64)
            header[: 2 + tensor.dim()] = torch.tensor([_SENT_TYPES.index(tensor.dtype), tensor.dim(), *tensor.shape])
            torch.distributed.send(header.to(self.device), dst=0)
            torch.distributed.send(tensor.to(self.device).contiguous(), dst=0)
        return None


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process: the GPU of its place on the machine, or the only one that it is given to see. Raises UserError
    if CUDA is asked for and absent, or if there is no GPU for its place."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "device: cuda was asked for, but torch sees no CUDA device; use device=cpu, or install a CUDA build of torch"
        )
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count > 1 and place >= count:
        raise UserError(
            f"this process is number {place} on its machine, from 0, and sees {count} GPUs: start no more processes than GPUs on "
            "each machine"
        )
    return torch.device("cuda", 0 if count == 1 else place)


def launched_processes() -> int:
    """Processes of this launch; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if _is_launched() else 1


def _is_launched() -> bool:
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


@contextlib.contextmanager
def process_grid(device: torch.device, parallel: ParallelConfig | None = None) -> Iterator[ProcessGrid]:
    """Join the process group that a launcher has prepared (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or form one of a
    single process without a launcher, and leave it at the end.

    Raises ConfigError, before anything is joined, if the number of processes does not fit `parallel`.
    """
    parallel = parallel or ParallelConfig()
    data_size = parallel.data_parallel_size(launched_processes())
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
        if parallel.tensor > 1:  # so that an exchange which was issued before a matmul also starts before it
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)

    # Longer than ours, so that ours, which says who hangs where, comes first.
    timeout = timedelta(minutes=parallel.timeout_minutes + 2)
    with _local_rank(device), _default_timeout(timeout), tempfile.TemporaryDirectory(prefix="megatron-plasticity-") as folder:
        deepspeed.comm.init_distributed(
            dist_backend="gloo" if device.type == "cpu" else "nccl",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timeout,
            **({} if _is_launched() else {"init_method": f"file://{Path(folder) / 'rendezvous'}", "rank": 0, "world_size": 1}),
        )
        # Closed last: leaving a group of which a process is gone can hang.
        with contextlib.closing(Liveness(torch.distributed.get_rank(), _patience(parallel))) as liveness:
            try:
                _watch_over_one_another(liveness, device)
                with liveness.member():
                    yield _grid(device, parallel, data_size, liveness)
            finally:
                # Through DeepSpeed, which otherwise believes that it is initialised when the next run of this process starts.
                deepspeed.comm.destroy_process_group()


@contextlib.contextmanager
def _local_rank(device: torch.device) -> Iterator[None]:
    """DeepSpeed insists on LOCAL_RANK, launcher or not, and takes it for the number of the GPU, which it is not where each
    process sees one GPU alone. Others take it for the sign of a launcher, so it does not stay."""
    before = os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("LOCAL_RANK", None)
        else:
            os.environ["LOCAL_RANK"] = before


@contextlib.contextmanager
def _default_timeout(timeout: timedelta) -> Iterator[None]:
    """The time limit of collectives in every group that is made inside the block: DeepSpeed states none for those that it makes,
    which do the work, and torch's own is ten minutes for NCCL, thirty for gloo."""
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(distributed_c10d, name) for name in names}
    try:
        for name in names:
            setattr(distributed_c10d, name, timeout)
        yield
    finally:
        for name in names:
            setattr(distributed_c10d, name, before[name])


def _patience(parallel: ParallelConfig) -> Patience:
    # Of thousands of processes each says a little less often, since one listens to all.
    return Patience(between_signs=max(2.0, torch.distributed.get_world_size() / 256), stall=60 * parallel.timeout_minutes)


def _watch_over_one_another(liveness: Liveness, device: torch.device) -> None:
    """Connect the processes of the launch beside the process group. A collective."""
    if torch.distributed.get_world_size() == 1:
        return
    where: list[Any] = [liveness.listen() if liveness.rank == 0 else None]
    torch.distributed.broadcast_object_list(where, device=device)
    if liveness.rank:
        liveness.connect(os.environ["MASTER_ADDR"], *where[0])


def _grid(device: torch.device, parallel: ParallelConfig, data_size: int, liveness: Liveness) -> ProcessGrid:
    rank = torch.distributed.get_rank()
    if parallel.model_parallel_size == 1:
        return ProcessGrid(rank, data_size, device, liveness=liveness)
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=parallel.pipeline, num_mp=parallel.tensor, num_dp=data_size)
    with contextlib.redirect_stdout(None):  # it prints the rank of every process
        groups = PipelineParallelGrid(topology)
    position = topology.get_coord(rank)
    tensor = TensorRanks(position.model, parallel.tensor, groups.get_slice_parallel_group(), parallel.sequence)
    return ProcessGrid(position.data, data_size, device, position.pipe, parallel, tensor, groups, liveness)
