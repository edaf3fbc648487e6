"""The cost model: what it counts is what the code does, and times obey the limits that any machine has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_plasticity.config.deepspeed import accumulation_steps
from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.model import Family, ModelConfig
from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.training import BatchConfig, EngineConfig, OptimizerConfig, PretrainConfig, TrainingRecipe
from megatron_plasticity.errors import ConfigError, UserError
from megatron_plasticity.launch.cost import StepTime, step_time
from megatron_plasticity.launch.hardware import A100, H100, H200, Group, Hardware, Host, Links, assumptions, device_named
from megatron_plasticity.launch.operations import (
    FUSED,
    Attention,
    Axis,
    Exchange,
    Kernels,
    Matmul,
    Sweep,
    operations,
    step_work,
    volume,
)
from megatron_plasticity.models.rotary import RotaryTable, rotate
from megatron_plasticity.models.sizes import parameter_shapes, training_flops
from tests.launch.traffic import matmul_flops, traffic_of
from tests.ranks import run_on_ranks

IDEAL = Links(network_gigabits=1e6, start=0.0, node_hop=0.0, network_hop=0.0)


def small(family: Family = "llama2", layers: int = 4, tied: bool = False) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "family": family,
            "layers": layers,
            "hidden_size": 64,
            "mlp_hidden_size": 160,
            "query_heads": 4,
            "kv_heads": 4 if family == "olmo2" else 2,
            "head_dim": 16,
            "vocab_size": 512,
            "context_length": 32,
            "tied_embeddings": tied,
        }
    )


def recipe(
    data: int = 1,
    zero: int = 0,
    precision: str = "fp32",
    accumulation: int = 1,
    micro: int = 2,
    checkpointing: bool = False,
    **parallel: Any,
) -> TrainingRecipe:
    return TrainingRecipe(
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1),
        batch=BatchConfig(global_batch_size=micro * data * accumulation, micro_batch_size=micro),
        engine=EngineConfig(
            zero_stage=zero,  # type: ignore[arg-type]
            precision=precision,  # type: ignore[arg-type]
            activation_checkpointing=checkpointing,
        ),
        parallel=ParallelConfig(**parallel),
        device="cpu",
    )


@pytest.fixture
def load(repository: Path) -> Callable[..., PretrainConfig]:
    def call(*overrides: str) -> PretrainConfig:
        return load_config(PretrainConfig, repository / "configs/runs/llama2-1b-20x.yaml", overrides)

    return call


# --- What is counted.


def flops(model: ModelConfig, config: TrainingRecipe, data: int, kind: type[Matmul] | type[Attention]) -> float:
    """Of all ranks in one step."""
    stages = step_work(model, config, data)
    once = sum(item.flops for stage in stages for item in operations((*stage.forward, *stage.backward)) if isinstance(item, kind))
    return once * accumulation_steps(config.batch, data) * config.parallel.tensor * data


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
@pytest.mark.parametrize(
    ("data", "layout"), [(1, {}), (4, {}), (1, {"tensor": 2}), (2, {"tensor": 2, "sequence": True}), (1, {"pipeline": 4})]
)
def test_flops_are_those_of_the_model(family: Family, data: int, layout: dict[str, Any]) -> None:
    model, config = small(family), recipe(data, 1, accumulation=2, **layout)
    tokens = config.batch.global_batch_size * model.context_length
    # The gains of norms count as parameters that are multiplied with each token, and are in no matrix.
    gains = sum(math.prod(shape) for name, shape in parameter_shapes(model).items() if "norm" in name)
    in_matmuls = training_flops(model, tokens, 0) - 6 * gains * tokens
    assert flops(model, config, data, Matmul) == in_matmuls
    # PaLM counts two products forwards and four backwards, in full; ours are causal, and five backwards.
    attention = training_flops(model, tokens, tokens * model.context_length) - training_flops(model, tokens, 0)
    assert flops(model, config, data, Attention) == attention * 7 / 12


def test_fused_kernels_multiply_as_much() -> None:
    model, config = small("olmo2"), recipe()
    counted = []
    for kernels in (Kernels(), FUSED):
        stage = step_work(model, config, 1, kernels)[0]
        work = list(operations((*stage.forward, *stage.backward)))
        products = sum(item.flops for item in work if isinstance(item, Matmul))
        counted.append((products, sum(item.bytes for item in work if isinstance(item, Sweep)), len(work)))
    assert counted[0][0] == counted[1][0]
    assert counted[1][1] < 0.6 * counted[0][1]
    assert counted[1][2] < counted[0][2]


def test_compiled_blocks_take_less_memory_traffic() -> None:
    model, plain = small(), recipe()
    compiled = plain.model_copy(update={"engine": plain.engine.model_copy(update={"compile": True})})
    single, fused = (step_time(model, config, 1, Hardware()) for config in (plain, compiled))
    assert (single.matmul, single.attention) == (fused.matmul, fused.attention)
    assert fused.memory < single.memory
    assert fused == step_time(model, plain, 1, Hardware(), Kernels(blocks=True, loss=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_that_torch_counts(tmp_path: Path, checkpointing: bool) -> None:
    model, config = small(tied=True), recipe(checkpointing=checkpointing)
    (counted,) = run_on_ranks(1, matmul_flops, model, config, log=tmp_path / "log")
    # torch counts the scores and the mixing of CPU attention elsewhere.
    assert counted == flops(model, config, 1, Matmul)


def sent(model: ModelConfig, config: TrainingRecipe, data: int) -> list[Counter[str]]:
    """Bytes by kind that the model says each stage exchanges in a step."""
    found = []
    stages = step_work(model, config, data)
    for number, stage in enumerate(stages):
        count = accumulation_steps(config.batch, data)
        total: Counter[str] = Counter()
        for times, work in ((count, (*stage.forward, *stage.backward, *stage.gathers)), (1, (*stage.reduction, *stage.update))):
            for item in operations(work):
                if isinstance(item, Exchange):
                    total[item.kind] += round(times * item.bytes)
        if stage.message:
            neighbours = (number > 0) + (number < len(stages) - 1)
            total["send"] += round(count * neighbours * stage.message.bytes)
        found.append(total)
    return found


TRAFFIC: list[tuple[int, list[tuple[ModelConfig, TrainingRecipe]]]] = [
    (
        2,
        [
            (small(), recipe(2, 0, accumulation=2)),
            (small(), recipe(2, 1, accumulation=2)),
            (small("olmo2"), recipe(2, 1, "bf16", accumulation=2)),
            (small(), recipe(2, 2, accumulation=2)),
            (small(), recipe(2, 2, "bf16", accumulation=2)),
        ],
    ),
    (1, [(small(), recipe(1, 0, accumulation=2, tensor=2)), (small("olmo2"), recipe(1, 1, "bf16", tensor=2))]),
    (
        1,
        [
            (small(), recipe(1, 0, tensor=2, sequence=True)),
            (small("olmo2"), recipe(1, 0, tensor=2, sequence=True, checkpointing=True)),
        ],
    ),
    (1, [(small(), recipe(1, 1, accumulation=3, pipeline=2))]),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("data", "cases"), TRAFFIC, ids=["data", "tensor", "sequence", "pipeline"])
def test_exchanges_are_those_of_the_engine(
    data: int, cases: Sequence[tuple[ModelConfig, TrainingRecipe]], tmp_path: Path
) -> None:
    """The bytes of every collective and message of a real step, kind by kind. What is not in the model: sums of a few numbers,
    and what DeepSpeed pads."""
    ranks = run_on_ranks(2, traffic_of, cases, log=tmp_path / "log")
    for number, (model, config) in enumerate(cases):
        expected = sent(model, config, data)
        for rank, counted in enumerate(found[number] for found in ranks):
            stage = expected[rank if config.parallel.pipeline > 1 else 0]
            for kind in stage.keys() | counted.keys():
                assert counted.get(kind, 0) == pytest.approx(stage[kind], rel=0.01, abs=256), (
                    config.engine,
                    config.parallel,
                    kind,
                )


@pytest.mark.distributed
def test_exchanges_of_zero_3(tmp_path: Path) -> None:
    """Weights are gathered where they are needed; small models keep what was gathered for the forward pass. Parameters below
    DeepSpeed's threshold, here all norm gains, are gathered once per step."""
    model, config = small(), recipe(2, 3, accumulation=2)
    config = config.model_copy(
        update={
            "engine": config.engine.model_copy(
                update={"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 100}}}
            )
        }
    )
    (counted, _) = (found[0] for found in run_on_ranks(2, traffic_of, [(model, config)], log=tmp_path / "log"))
    (expected,) = sent(model, config, 2)
    for kind in ("all_gather", "reduce_scatter"):
        assert counted[kind] == pytest.approx(expected[kind], rel=0.05), kind


class Bytes(TorchDispatchMode):
    """Counts what PyTorch's kernels read and write of tensors of at least so many numbers; views cost nothing."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.bytes, self.kernels = numbers, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func._schema.name and "detach" not in func._schema.name:
            into = list(tree_leaves((args, kwargs)))
            # What is written in place is among the arguments too, and is read and written.
            touched = [x for x in [*into, *tree_leaves(found)] if isinstance(x, torch.Tensor) and x.numel() >= self.numbers]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in touched)
            self.kernels += bool(touched)
        return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["rotary", "swiglu"])
def test_sweeps_are_what_our_code_reads_and_writes(name: str, precision: str) -> None:
    """The kernels that PyTorch runs one by one; they are the same on a CPU and on a GPU."""
    model, config = small(), recipe(precision=precision, micro=4)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    rows, width = (4, model.context_length), model.hidden_size if name == "rotary" else model.mlp_hidden_size
    x = torch.randn(*rows, width, dtype=dtype, requires_grad=True)
    other = torch.randn(*rows, width, dtype=dtype, requires_grad=True)
    cos, sin = RotaryTable(model.head_dim, 1e4, model.context_length).at(model.context_length, torch.device("cpu"))
    with Bytes(x.numel()) as forward:
        out = rotate(x.unflatten(-1, (-1, model.head_dim)), cos, sin) if name == "rotary" else F.silu(x) * other
    gradient = torch.ones_like(out)
    with Bytes(x.numel()) as backward:
        torch.autograd.grad(out, (x,) if name == "rotary" else (x, other), gradient)
    stage = step_work(model, config, 1)[0]
    for counted, work, suffix in ((forward, stage.forward, ""), (backward, stage.backward, " backward")):
        sweep = next(
            item for item in operations(work) if isinstance(item, Sweep) and item.name == name + suffix and item.width == width
        )
        assert (counted.bytes, counted.kernels) == (sweep.bytes, sweep.kernels), suffix


# --- Times.


def test_a_small_product_by_hand() -> None:
    """One full tile: 2·128·256·64 FLOPs on one processor of 132, beside which its matrices pass through memory faster."""
    device = replace(H100, sustained_share=1.0)
    rate = 989e12 * device.matmul_share / 132
    expected = 2 * 128 * 256 * 64 / rate + device.kernel_seconds
    assert Hardware(device).compute(Matmul(128, 256, 64, 2)) == pytest.approx(expected, rel=0.35)
    # Twice the processors' worth of tiles takes twice as long, but for what splits can balance.
    one, two = (Hardware(device).compute(Matmul(128 * 132 * waves, 256, 8192, 2)) for waves in (1, 2))
    assert two - device.kernel_seconds == pytest.approx(2 * (one - device.kernel_seconds), rel=0.02)
    # One tile more than a wave holds costs nearly another wave; and a row too many another row of tiles.
    over = Hardware(device).compute(Matmul(128 * 133, 256, 8192, 2))
    assert over > 1.2 * one


def test_rows_off_the_alignment_are_slow() -> None:
    aligned, off = (Hardware().compute(Matmul(16384, columns, 2816, 2)) for columns in (6184, 6180))
    assert off > 1.5 * aligned


def test_an_all_reduce_by_hand() -> None:
    """8 GPUs of a node, 1 GB: a ring of 14 hops, or a tree that goes 7 up and 7 down; 2·7/8 of a GB at 480 GB/s."""
    links = Links()
    expected = links.start + 14 * links.node_hop + 1.75e9 / 480e9
    assert Hardware().exchange(Exchange("all_reduce", "data", 1e9), Group(8, 8)) == pytest.approx(expected)
    # Between nodes each of 8 GPUs has its own adapter.
    two_nodes = Hardware().exchange(Exchange("all_gather", "data", 1e9), Group(16, 8))
    assert two_nodes == pytest.approx(links.start + 14 * links.node_hop + 2 * links.network_hop + 15 / 16 * 1e9 / 370e9)
    one_each = Hardware().exchange(Exchange("all_gather", "data", 1e9), Group(16, 1))
    assert one_each == pytest.approx(links.start + 16 * links.network_hop + 15 / 16 * 1e9 / 47e9)


def test_volumes() -> None:
    assert volume("all_reduce", 80, 8) == 140
    assert volume("all_gather", 80, 8) == volume("reduce_scatter", 80, 8) == 70
    assert volume("send", 80, 2) == 80


@dataclass(frozen=True)
class OneSecond:
    """A machine on which each operation takes a second and each exchange ten."""

    hides_exchanges: bool = True
    kernel_host_seconds: float = 0.0
    micro_batch_seconds: float = 0.0
    step_seconds: float = 0.0
    hook_seconds: float = 0.0
    zero3_overlap: float = 0.0

    def group(self, axis: Axis, data: int, tensor: int) -> Group:
        return Group({"tensor": tensor, "data": data, "pipeline": 2}[axis], 8)

    def compute(self, work: Matmul | Attention | Sweep) -> float:
        return 1.0

    def exchange(self, exchange: Exchange, group: Group) -> float:
        return 10.0 if group.ranks > 1 else 0.0


def test_one_layer_counted_by_hand() -> None:
    """Forwards: 7 projections, and the head with its two gradients; attention; embedding, 3 norms, 2 rotations, SwiGLU, 2
    residual sums, loss and its gradient. Backwards: two products for each of the 7; attention; 3 norms, 2 rotations, SwiGLU, 2
    scaled gradients of the head, 2 sums of residual gradients, 2 where three projections share an input and 1 where two do,
    embedding.
    The optimizer: norm, twice, clipping, AdamW, zeroing."""
    time = step_time(small(layers=1), recipe(), 1, OneSecond())
    assert time == StepTime(matmul=(7 + 3) + 14, attention=2, memory=11 + 14, optimizer=5)


def test_a_pipeline_by_hand() -> None:
    """Two stages of a layer each; the second has the head and is slower: three micro-batches at its pace, one at the first's."""
    model, config = small(layers=2), recipe(1, 1, accumulation=3, pipeline=2)
    time = step_time(model, config, 1, OneSecond())
    block = 7 + 14 + 2 + (2 + 2 + 1 + 2) + (2 + 2 + 1 + 2 + 3)
    first, second = (
        block + 2 + 1 + 20,
        block + 3 + 2 + 2 + 2 + 1 + 20,
    )  # embedding; head, norm, loss, scaling; messages; gradients
    assert time.bubble == first
    assert time.total == pytest.approx(3 * second + first + time.optimizer)
    assert time.exchange == 3 * 20


def test_exchanges_hide_behind_products() -> None:
    """With sequence parallelism a layer exchanges 4 times forwards and 6 backwards, of which 4 while something is computed: the
    gradients of the inputs of 3 and of 2 projections with their sums, and of their weights."""
    model, config = small(layers=1), recipe(tensor=2, sequence=True)
    hidden, in_view = (step_time(model, config, 1, OneSecond(hides_exchanges=hides)).exchange for hides in (True, False))
    # Per block 5 + 3 + 3 + 2 are computed beside an exchange of 10.
    assert in_view - hidden == 13


@pytest.mark.parametrize("device", [H100, H200, A100], ids=lambda device: device.name)
def test_twice_the_gpus_halve_an_ideal_step(load: Callable[..., PretrainConfig], device: object) -> None:
    """Without links to wait for, a host, or anything that each rank does for all: the micro-batches are halved."""
    host = Host(0.0, 0.0, 0.0, 0.0)
    hardware = Hardware(replace(device, kernel_seconds=0.0, node_bandwidth=1e18, node_all_reduce=1e18), IDEAL, host)  # type: ignore[type-var]
    config = load("engine.zero_stage=3", "batch.micro_batch_size=8")
    times = [step_time(config.model, config, gpus, hardware) for gpus in (8, 16)]
    one, two = (time.total - time.optimizer for time in times)
    assert one == pytest.approx(2 * two, rel=0.01)
    assert times[0].optimizer == pytest.approx(2 * times[1].optimizer)


def test_no_link_no_step(load: Callable[..., PretrainConfig]) -> None:
    config = load()
    assert step_time(config.model, config, 16, Hardware(links=Links(network_share=0.0))).total == math.inf
    assert step_time(config.model, config, 8, Hardware(links=Links(network_share=0.0))).total < math.inf


def test_better_hardware_is_never_slower(load: Callable[..., PretrainConfig]) -> None:
    config = load("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "batch.micro_batch_size=4")

    def seconds(hardware: Hardware) -> float:
        return step_time(config.model, config, 16, hardware).total

    plain = seconds(Hardware())
    for name in ("bf16", "memory", "matmul_share", "memory_share", "attention_share_64", "node_bandwidth", "sustained_share"):
        better = replace(H100, **{name: getattr(H100, name) * 1.2})
        assert seconds(Hardware(better)) < plain, name
    assert seconds(Hardware(links=Links(network_gigabits=800))) < plain
    assert seconds(Hardware(links=Links(gpus_per_node=64))) <= plain
    assert seconds(Hardware(H200)) < plain < seconds(Hardware(A100))


def test_parts_add_up_and_follow_the_layout(load: Callable[..., PretrainConfig]) -> None:
    plain = load()
    time = step_time(plain.model, plain, 8, Hardware())
    assert time.total == pytest.approx(sum(time.parts.values()))
    assert time.bubble == 0 < time.exchange
    again = load("engine.activation_checkpointing=true")
    recomputed = step_time(again.model, again, 8, Hardware())
    assert recomputed.matmul == pytest.approx(time.matmul * 4 / 3, rel=0.1)  # without head and last projections
    piped = load("parallel.pipeline=2")
    assert step_time(piped.model, piped, 4, Hardware()).bubble > 0


def test_every_figure_has_a_unit_and_a_source() -> None:
    found = list(assumptions(Hardware()))
    assert {figure.part for figure in found} == {"h100", "links", "host", "ZeRO"}
    assert len(found) > 25
    assert all(figure.value and figure.meaning and figure.source for figure in found)


def test_bad_hardware_is_one_message() -> None:
    with pytest.raises(UserError, match=r"--gpu v100: not known; choose one of h100, h200, a100"):
        device_named("v100")
    with pytest.raises(UserError, match="--gpus-per-node 0"):
        Links(gpus_per_node=0)
    for bad in (-1.0, 0.0, math.nan, math.inf):
        with pytest.raises(UserError, match="--network"):
            Links(network_gigabits=bad)


def test_a_batch_that_cannot_be_split(load: Callable[..., PretrainConfig]) -> None:
    config = load()
    with pytest.raises(ConfigError, match="cannot be split"):
        step_time(config.model, config, 7, Hardware())
