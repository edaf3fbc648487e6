"""Predicted and measured times of training steps on this machine's CPUs, for small models under several layouts.

    python tools/bench/step_time.py [--cases NAME …] [--steps 12] [--patience 60] [--output step_time.json]

For each layout its ranks first measure this machine, all at the same time, as they will share its memory: every operation that a
step consists of (`launch/operations.py`) by itself, at its own size, with the code that training runs; every exchange over gloo;
and what a step costs beside its operations, on a model of the same depth that is too narrow to compute much. From these figures
`launch/cost.py` predicts the step of the real model, which is then measured through the real engine. One thread per rank.

Times are means: of CPU time where there is one rank, of wall time where ranks wait for each other. Each measurement is taken
again until other processes use less than a fifth of a core meanwhile, or patience ends. How many cores they used stands beside
each row: with two ranks on two cores, above a few tenths neither column means much.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from command import parser, positive, run
from torch import Tensor
from torch.nn import functional as F

from megatron_plasticity.config.deepspeed import accumulation_steps
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.training import BatchConfig, EngineConfig, OptimizerConfig, TrainingRecipe
from megatron_plasticity.data.micro_batch import MicroBatch
from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.command import free_port
from megatron_plasticity.launch.cost import StepTime, step_time
from megatron_plasticity.launch.hardware import Group
from megatron_plasticity.launch.operations import Attention, Axis, Exchange, Matmul, Sweep, operations, step_work
from megatron_plasticity.launch.workers import start_worker, worker_context
from megatron_plasticity.models import loss
from megatron_plasticity.models.attention import attend
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.rotary import RotaryTable, rotate
from megatron_plasticity.models.transformer import local_model
from megatron_plasticity.parallel.grid import ProcessGrid, process_grid
from megatron_plasticity.parallel.tensor import SINGLE
from megatron_plasticity.training.batches import StepBatch
from megatron_plasticity.training.engine import TrainingEngine

ALLOWED = 0.15
SECONDS_LIMIT = 600.0  # beyond patience
BUSY = 0.2  # cores that others may use, and a measurement still counts as quiet
_CYCLED = 32 * 2**20  # operations go over so many bytes of input before they meet the same again, as in a real step
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class Case:
    """One model under one layout."""

    name: str
    family: str = "llama2"
    hidden_size: int = 256
    layers: int = 4
    vocab_size: int = 2048
    length: int = 256
    micro: int = 4
    accumulation: int = 1
    zero: int = 0
    precision: str = "fp32"
    data: int = 1
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    checkpointing: bool = False

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def model(self) -> ModelConfig:
        heads = 4
        return ModelConfig.model_validate(
            {
                "family": self.family,
                "layers": self.layers,
                "hidden_size": self.hidden_size,
                "mlp_hidden_size": max(16, round(self.hidden_size * 8 / 3 / 16) * 16),
                "query_heads": heads,
                "kv_heads": heads if self.family == "olmo2" else 2,
                "head_dim": self.hidden_size // heads,
                "vocab_size": self.vocab_size,
                "context_length": self.length,
            }
        )

    @property
    def recipe(self) -> TrainingRecipe:
        # DeepSpeed's default bucket, 5e8 elements, takes longer to allocate than these models take to train.
        zero = {} if self.zero == 0 else {"zero_optimization": {"reduce_bucket_size": 20_000_000}}
        return TrainingRecipe(
            optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1),
            batch=BatchConfig(global_batch_size=self.micro * self.data * self.accumulation, micro_batch_size=self.micro),
            engine=EngineConfig(
                zero_stage=self.zero,  # type: ignore[arg-type]
                precision=self.precision,  # type: ignore[arg-type]
                activation_checkpointing=self.checkpointing,
                deepspeed=zero,
            ),
            parallel=ParallelConfig(pipeline=self.pipeline, tensor=self.tensor, sequence=self.sequence),
            device="cpu",
        )

    def narrow(self, accumulation: int) -> Case:
        """As deep, under the same layout, but with next to nothing to compute."""
        return replace(self, hidden_size=32, vocab_size=128, length=16, micro=1, accumulation=accumulation)


CASES = (
    Case("dp1 zero0"),
    Case("dp1 zero1 acc2", zero=1, accumulation=2),
    Case("dp1 zero2 acc2", zero=2, accumulation=2),
    Case("dp1 zero3 acc2", zero=3, accumulation=2),
    Case("dp1 zero1 bf16 acc2", zero=1, precision="bf16", accumulation=2),
    Case("dp1 zero0 checkpointing", checkpointing=True),
    Case("dp1 zero0 olmo2", family="olmo2"),
    Case("dp1 zero0 wide", hidden_size=512, layers=2),
    Case("dp2 zero0", data=2),
    Case("dp2 zero1 acc2", data=2, zero=1, accumulation=2),
    Case("dp2 zero2", data=2, zero=2),
    Case("dp2 zero3", data=2, zero=3),
    Case("dp2 zero1 bf16 acc2", data=2, zero=1, precision="bf16", accumulation=2),
    Case("tp2", tensor=2),
    Case("tp2 sequence", tensor=2, sequence=True),
    Case("tp2 olmo2", tensor=2, family="olmo2"),
    Case("pp2 acc4", pipeline=2, accumulation=4, zero=1),
    Case("pp2 acc2 bf16", pipeline=2, accumulation=2, zero=1, precision="bf16"),
)


# --- This machine, as measured.


@dataclass
class Measured:
    """Seconds of operations on this machine, and what a step costs beside them. A `Timing` of `launch/cost.py`."""

    computed: dict[Any, float] = field(default_factory=dict)
    exchanged: dict[Exchange, float] = field(default_factory=dict)
    micro_batch_seconds: float = 0.0
    step_seconds: float = 0.0

    hides_exchanges = False
    """Gloo exchanges with the cores that compute."""
    kernel_host_seconds = 0.0
    """An operation was timed with what starts it."""
    hook_seconds = 0.0
    zero3_overlap = 0.0

    def group(self, axis: Axis, data: int, tensor: int) -> Group:
        return Group({"tensor": tensor, "data": data, "pipeline": 2}[axis], 2)

    def compute(self, work: Matmul | Attention | Sweep) -> float:
        return self.computed[work]

    def exchange(self, exchange: Exchange, group: Group) -> float:
        return 0.0 if group.ranks == 1 else self.exchanged[exchange]


def measure_machine(cases: Iterable[Case], quiet: Quiet, known: dict[str, float]) -> Measured:
    """Every operation and exchange of the cases' steps, on all ranks at once; of each the slowest rank's time. What is `known`
    from another case is not measured again; what was measured in quiet is added."""
    measured, grid = Measured(), quiet.grid
    everything: dict[Any, Case] = {}
    for case in cases:
        for stage in step_work(case.model, case.recipe, case.data):
            single = operations((*stage.forward, *stage.backward, *stage.reduction, *stage.update))
            found = [*single, *stage.gathers, *([stage.message] if stage.message else [])]
            everything |= {operation: case for operation in found if operation not in everything}
    for operation, case in everything.items():
        # Sweeps depend on the model's shape too, beyond what stands in them.
        key = f"{grid.size} {case.hidden_size} {case.vocab_size} {case.length} {case.precision} {operation}"
        if key not in known:
            run = _exchange(operation, grid) if isinstance(operation, Exchange) else _computation(operation, case)
            seconds, others = _timed(run, quiet)
            if others <= BUSY:
                known[key] = seconds
        else:
            seconds = known[key]
        (measured.exchanged if isinstance(operation, Exchange) else measured.computed)[operation] = seconds
    return measured


def _clock(grid: ProcessGrid) -> Callable[[], float]:
    """A single rank of a single thread waits for nothing, so its CPU time is what it would take on a quiet machine."""
    return time.process_time if grid.size == 1 else time.perf_counter


@dataclass
class Quiet:
    """Takes measurements again until other processes leave the machine alone meanwhile, or patience ends."""

    grid: ProcessGrid
    deadline: float
    """On the clock of `time.monotonic`."""
    found: list[float] = field(default_factory=list)
    """Cores that others used during each measurement."""

    def measure(self, run: Callable[[], float]) -> tuple[float, float]:
        """What `run` returns on the slowest rank, and the cores that others used, of the quietest attempt. A collective."""
        best = (math.inf, 0.0)
        while True:
            self.grid.barrier()
            busy, own, wall = _busy_seconds(), time.process_time(), time.perf_counter()
            found = run()
            self.grid.barrier()
            values = torch.tensor([time.process_time() - own, 0.0], dtype=torch.float64)
            slowest = torch.tensor([found], dtype=torch.float64)
            if self.grid.size > 1:
                torch.distributed.all_reduce(values)
                torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
            foreign = max(0.0, (_busy_seconds() - busy - float(values[0])) / (time.perf_counter() - wall))
            best = self.grid.from_main(min(best, (foreign, float(slowest))))
            if self.grid.from_main(best[0] <= BUSY or time.monotonic() > self.deadline):
                self.found.append(best[0])
                return best[1], best[0]


def _timed(run: Callable[[], object], quiet: Quiet) -> tuple[float, float]:
    """Mean seconds of a run, and the cores that others used."""
    now = _clock(quiet.grid)
    run()
    began = now()
    run()
    repetitions = quiet.grid.from_main(max(5, min(200, round(0.1 / max(now() - began, 1e-6)))))

    def several() -> float:
        began = now()
        for _ in range(repetitions):
            run()
        return (now() - began) / repetitions

    return quiet.measure(several)


def _exchange(exchange: Exchange, grid: ProcessGrid) -> Callable[[], object]:
    """What training calls, on a tensor of so many bytes."""
    if grid.size == 1:
        return lambda: None
    count = max(2, round(exchange.bytes / 4))
    whole, part = torch.zeros(count + count % 2), torch.zeros((count + 1) // 2)
    rank = torch.distributed.get_rank()
    if exchange.kind == "all_reduce":
        return lambda: torch.distributed.all_reduce(whole)
    if exchange.kind == "all_gather":
        return lambda: torch.distributed.all_gather_into_tensor(whole, part)
    if exchange.kind == "reduce_scatter":
        return lambda: torch.distributed.reduce_scatter_tensor(part, whole)

    def there() -> None:
        if rank == 0:
            torch.distributed.send(whole, 1)
        else:
            torch.distributed.recv(whole, 0)
        # The clock of the sender would stop before the message has arrived.
        if rank == 0:
            torch.distributed.recv(part[:1], 1)
        else:
            torch.distributed.send(part[:1], 0)

    return there


def _computation(operation: Matmul | Attention | Sweep, case: Case) -> Callable[[], object]:
    if isinstance(operation, Matmul):
        return _matmul(operation)
    if isinstance(operation, Attention):
        return _attention(operation)
    return _sweep(operation, case)


def _cycling(make: Callable[[], tuple[Tensor, ...]], function: Callable[..., Any]) -> Callable[[], object]:
    """`function` of other inputs each time, until all of them together are larger than a cache; what comes out is kept for a
    while, as activations are, so that it does not land in memory that was just freed."""
    first = make()
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    inputs = [first, *(make() for _ in range(min(16, math.ceil(_CYCLED / max(size, 1)))))]
    turn = itertools.cycle(inputs)
    kept: collections.deque[Any] = collections.deque(maxlen=2 * len(inputs))
    return lambda: kept.append(function(*next(turn)))


def _matmul(work: Matmul) -> Callable[[], object]:
    dtype = _DTYPES[work.element]
    if work.role == "forward":
        return _cycling(
            lambda: (torch.randn(work.rows, work.inner, dtype=dtype), torch.randn(work.columns, work.inner, dtype=dtype)),
            F.linear,
        )
    if work.role == "input":
        return _cycling(
            lambda: (torch.randn(work.rows, work.inner, dtype=dtype), torch.randn(work.inner, work.columns, dtype=dtype)),
            torch.matmul,
        )
    return _cycling(
        lambda: (torch.randn(work.inner, work.rows, dtype=dtype), torch.randn(work.inner, work.columns, dtype=dtype)),
        lambda gradient, x: gradient.t() @ x,
    )


def _attention(work: Attention) -> Callable[[], object]:
    dtype = _DTYPES[work.element]

    def heads(count: int) -> Tensor:
        rows = torch.randn(work.sequences, work.length, count, work.head_dim, dtype=dtype)
        return rows.transpose(1, 2).requires_grad_()

    def make() -> tuple[Tensor, ...]:
        q, k, v = heads(work.query_heads), heads(work.kv_heads), heads(work.kv_heads)
        return (q, k, v, attend(q, k, v, None, "auto")) if work.backward else (q, k, v)

    if work.backward:
        return _cycling(make, lambda q, k, v, out: torch.autograd.grad(out, (q, k, v), out, retain_graph=True))
    return _cycling(make, lambda q, k, v: attend(q, k, v, None, "auto"))


def _through(forward: Callable[..., Tensor], make: Callable[[], tuple[Tensor, ...]], backward: bool) -> Callable[[], object]:
    """A function's forward pass, or its backward pass alone."""
    if not backward:
        return _cycling(make, forward)

    def with_output() -> tuple[Tensor, ...]:
        inputs = make()
        output = forward(*inputs)
        return (*inputs, output, torch.randn_like(output))

    def back(*tensors: Tensor) -> Any:
        *inputs, output, gradient = tensors
        learned = [tensor for tensor in inputs if tensor.requires_grad]
        return torch.autograd.grad(output, learned, gradient, retain_graph=True)

    return _cycling(with_output, back)


def _sweep(work: Sweep, case: Case) -> Callable[[], object]:
    model, numbers, width = case.model, round(work.numbers), work.width
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    name, backward = work.name.removesuffix(" backward"), work.name.endswith(" backward")

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    if name == "norm":
        return _through(
            lambda x, gain: F.rms_norm(x, (width,), gain, 1e-5),
            lambda: (tensor(numbers // width, width), tensor(width)),
            backward,
        )
    if name == "split norm":
        return _through(_split_norm, lambda: (tensor(numbers // width, width), tensor(width)), backward)
    if name == "rotary":
        cos, sin = RotaryTable(model.head_dim, 1e4, model.context_length).at(model.context_length, torch.device("cpu"))
        shape = (-1, model.context_length, width // model.head_dim, model.head_dim)
        return _through(lambda x: rotate(x.view(shape), cos, sin), lambda: (tensor(numbers // width, width),), backward)
    if name == "swiglu":
        rows = numbers // width
        return _through(lambda gate, up: F.silu(gate) * up, lambda: (tensor(rows, width), tensor(rows, width)), backward)
    if name in ("loss", "loss gradient"):
        return _cycling(lambda: (tensor(numbers // width, width).detach(),), _loss_sweep(name, numbers // width))
    if name == "embedding":
        rows = numbers // width
        tokens = torch.randint(0, model.vocab_size, (rows,))
        return _through(lambda weight: F.embedding(tokens, weight), lambda: (tensor(model.vocab_size, width),), backward)
    return _streaming(work, dtype)


def _loss_sweep(name: str, rows: int) -> Callable[[Tensor], object]:
    """What `linear_cross_entropy` does with rows of logits between its products."""
    targets, how = torch.zeros(rows, dtype=torch.int64), loss.How(SINGLE, 0.0, 1.0, False, True, True)
    if name == "loss":
        return lambda logits: loss.Rows.of(logits, targets, SINGLE).sums()
    zeros = torch.zeros(rows)
    known = loss.Rows(torch.empty(0), targets, targets == 0, targets == 0, zeros, zeros, False)
    return lambda logits: known._replace(logits=logits).become_gradients(how)


def _split_norm(x: Tensor, gain: Tensor) -> Tensor:
    """What `HeadParallelRMSNorm` computes on one rank, without the exchange."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) / x.shape[-1] + 1e-5) * gain).to(x.dtype)


def _streaming(work: Sweep, dtype: torch.dtype) -> Callable[[], object]:
    """Operations that DeepSpeed and AdamW run over gradients and weights."""
    numbers = max(1, round(work.numbers))
    if work.name == "adamw":
        weight = torch.zeros(numbers, requires_grad=True)
        weight.grad = torch.randn(numbers)
        optimizer = torch.optim.AdamW([weight], lr=1e-3)
        return lambda: optimizer.step()
    gradient = torch.randn(numbers)
    if work.name == "gradient norm":
        return lambda: gradient.norm()
    if work.name == "clip":
        return lambda: gradient.mul_(1.0)
    if work.name == "zero":
        return lambda: gradient.zero_()
    if work.name == "add":
        return _cycling(lambda: (torch.randn(numbers, dtype=dtype), torch.randn(numbers, dtype=dtype)), torch.add)
    if work.name == "copy" and work.numbers:
        return _cycling(lambda: (torch.randn(numbers, dtype=dtype),), torch.clone)
    # Copies, casts and sums of gradients, in whatever mixture: as many bytes of a sum in place.
    count = max(1, round(work.bytes / 12))
    into, other = torch.zeros(count), torch.ones(count)
    return lambda: into.add_(other)


# --- The steps themselves.


@dataclass(frozen=True)
class Steps:
    """Seconds of steps, and the cores that other processes used meanwhile."""

    seconds: float
    foreign: float
    quiet: int
    taken: int


def run_steps(case: Case, quiet: Quiet, steps: int) -> Steps:
    """Train through the real engine; the time of a step is that of the slowest rank."""
    grid, now = quiet.grid, _clock(quiet.grid)
    part = local_model(case.model, grid)
    initialise(part, seed=1)
    engine = TrainingEngine(part, case.recipe, 0.1, grid)
    batch = _batch(case, grid)

    def step() -> float:
        began = now()
        engine.train_batch(batch)
        engine.gradient_norm  # noqa: B018  a step is over when its norm is known
        return now() - began

    for _ in range(3):  # the first steps make what is made once
        step()
    taken = [quiet.measure(step) for _ in range(steps)]
    engine.close()
    undisturbed = [seconds for seconds, others in taken if others <= BUSY]
    chosen = undisturbed if len(undisturbed) >= 4 else [seconds for seconds, _ in taken]
    return Steps(statistics.fmean(chosen), statistics.median(others for _, others in taken), len(undisturbed), len(taken))


def _busy_seconds() -> float:
    """CPU time that all processes of this machine have used."""
    values = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(values) - values[3] - values[4]) / os.sysconf("SC_CLK_TCK")


def _batch(case: Case, grid: ProcessGrid) -> StepBatch:
    model, count = case.model, case.recipe.batch.global_batch_size
    generator = torch.Generator().manual_seed(grid.data_rank)
    rows = [
        torch.randint(0, model.vocab_size, (case.micro, model.context_length + 1), generator=generator)
        for _ in range(accumulation_steps(case.recipe.batch, grid.data_size))
    ]
    tokens = count * model.context_length
    parts = [MicroBatch(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]
    return StepBatch(parts, tokens, tokens, tokens * model.context_length, [[0] * len(part.inputs) for part in parts])


# --- A case on its ranks.


@dataclass(frozen=True)
class Row:
    """What came out for one case."""

    case: str
    ranks: int
    predicted: float
    measured: float
    parts: dict[str, float]
    loud: float
    """Share of the measurements behind the prediction that others disturbed."""
    foreign: float
    """Cores that others used during the measured steps."""
    quiet: int
    taken: int

    @property
    def is_quiet(self) -> bool:
        return self.loud <= 0.1 and self.quiet >= 4

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def run_case(case: Case, steps: int, patience: float, folder: str) -> None:
    """On every rank: measure the machine, predict, train; the first rank writes `row.json`."""
    torch.set_num_threads(1)
    with process_grid(torch.device("cpu"), case.recipe.parallel) as grid:
        few, many = (case.narrow(count) for count in (max(1, case.accumulation), max(1, case.accumulation) + 2))
        began, shared = time.monotonic(), Path(folder) / "known.json"
        known: dict[str, float] = json.loads(shared.read_text(encoding="utf-8")) if shared.is_file() else {}
        first = Quiet(grid, began + patience * 0.7)
        machine = measure_machine((case, few, many), first, known)
        narrow = [run_steps(one, first, 2 * steps).seconds for one in (few, many)]
        _set_overheads(machine, (few, many), narrow)
        predicted = predict(case, machine)
        found = run_steps(case, Quiet(grid, began + patience), steps)
        if grid.is_main:
            loud = sum(others > BUSY for others in first.found) / len(first.found)
            row = Row(
                case.name,
                case.ranks,
                predicted.total,
                found.seconds,
                predicted.parts,
                loud,
                found.foreign,
                found.quiet,
                found.taken,
            )
            (Path(folder) / "row.json").write_text(json.dumps(asdict(row)), encoding="utf-8")
            shared.write_text(json.dumps(known), encoding="utf-8")


def predict(case: Case, machine: Measured) -> StepTime:
    return step_time(case.model, case.recipe, case.data, machine)


def _set_overheads(machine: Measured, cases: Sequence[Case], seconds: Sequence[float]) -> None:
    """What narrow models take beyond their operations, per micro-batch and per step."""
    beyond = [took - predict(case, machine).total for case, took in zip(cases, seconds, strict=True)]
    more = cases[1].accumulation - cases[0].accumulation
    machine.micro_batch_seconds = max(0.0, (beyond[1] - beyond[0]) / more)
    turns = cases[0].accumulation + cases[0].pipeline - 1
    machine.step_seconds = max(0.0, beyond[0] - turns * machine.micro_batch_seconds)


def main() -> int:
    """Run the cases, print the table; 1 if one of them misses."""
    reader = parser(__doc__, "a prediction missed")
    reader.add_argument("--cases", nargs="+", metavar="NAME", help="only those whose names contain one of these")
    reader.add_argument("--steps", type=positive, default=12, help="measured steps of each case [12]")
    reader.add_argument("--patience", type=_seconds, default=60.0, help="seconds of each case to wait for quiet moments [60]")
    reader.add_argument("--output", type=Path, help="also write the rows here, as JSON")
    arguments = reader.parse_args()
    chosen = [case for case in CASES if arguments.cases is None or any(part in case.name for part in arguments.cases)]
    if not chosen:
        names = ", ".join(case.name for case in CASES)
        raise UserError(f"--cases {' '.join(arguments.cases or ())}: expected a part of one of {names}")
    if arguments.output is not None and not arguments.output.resolve().parent.is_dir():
        raise UserError(f"--output {arguments.output}: no such folder")
    print(
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, torch {torch.__version__}, {os.cpu_count()} cores, 1 thread per rank"
    )
    print(f"load average at the start: {' '.join(f'{load:.1f}' for load in os.getloadavg())}", flush=True)
    print(f"{'case':26} ranks  predicted   measured  ratio  {'largest parts':44} others", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="step-time-") as folder:
        for case in chosen:
            row = _launch(case, arguments.steps, arguments.patience, Path(folder))
            rows.append(row)
            print(_line(row), flush=True)
    within = sum(abs(row.ratio - 1) <= ALLOWED for row in rows)
    print(f"{within} of {len(rows)} within {ALLOWED:.0%}; median ratio {statistics.median(row.ratio for row in rows):.2f}")
    quiet = [row for row in rows if row.is_quiet]
    good = sum(abs(row.ratio - 1) <= ALLOWED for row in quiet)
    print(f"of those measured in quiet: {good} of {len(quiet)}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8")
    return 0 if within == len(rows) else 1


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, not {text!r}")
    return value


def _line(row: Row) -> str:
    largest = sorted(row.parts.items(), key=lambda part: -part[1])[:4]
    parts = ", ".join(f"{seconds / row.predicted:.0%} {name}" for name, seconds in largest if seconds)
    quiet = "" if row.is_quiet else f" DISTURBED: {row.loud:.0%} of operations, {row.taken - row.quiet} of {row.taken} steps"
    return (
        f"{row.case:26} {row.ranks:>5} {row.predicted * 1e3:>7.1f} ms {row.measured * 1e3:>7.1f} ms {row.ratio:>6.2f}  "
        f"{parts:44} {row.foreign:.1f} cores{quiet}"
    )


def _launch(case: Case, steps: int, patience: float, folder: Path) -> Row:
    context = worker_context(["megatron_plasticity.training.pretrain"], cuda=False)
    log, result = folder / "log", folder / "row.json"
    shared = {"WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start_worker(
            context,
            run_case,
            (case, steps, patience, str(folder)),
            name=f"rank-{rank}",
            log=log,
            threads=1,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(case.ranks)
    ]
    deadline = time.monotonic() + SECONDS_LIMIT + patience
    try:
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            time.sleep(0.2)
            if time.monotonic() > deadline:
                raise UserError(f"{case.name}: not done after {SECONDS_LIMIT + patience:.0f} s")
        if any(rank.exitcode for rank in ranks):
            raise UserError(f"{case.name} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    row = Row(**json.loads(result.read_text(encoding="utf-8")))
    result.unlink()
    return row


if __name__ == "__main__":
    run(main)
