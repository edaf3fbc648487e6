"""GPUs, their links and their hosts, in the figures from which times are predicted; each has its unit and its source.

None of them was measured by us: nothing here is more than an assumption, and `plan --assumptions` prints all of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.operations import Attention, Axis, Collective, Exchange, Matmul, Sweep, padded, volume

_TILES = ((256, 128), (128, 256), (128, 128), (64, 256), (64, 128), (64, 64))
_SPLITS = (1, 2, 4, 8, 16, 32)
_INNER = 64
"""Numbers of the inner dimension that a tile takes at a time."""
_HEAD_DIMS = (64, 96, 128, 192, 256)
"""Head dimensions for which there are kernels; others are padded to the next."""
_ALIGNMENT = 16
"""Bytes to which the rows of a matrix must be aligned for the fast kernels (NVIDIA, Matrix Multiplication Background)."""

_DATA_SHEET = "NVIDIA's data sheet"
_GUESS = "our assumption"


def _figure(unit: str, meaning: str, source: str, default: Any = None) -> Any:
    about = {"unit": unit, "meaning": meaning, "source": source}
    return field(metadata=about) if default is None else field(default=default, metadata=about)


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str = ""
    gibibytes: float = _figure("GiB", "memory", _DATA_SHEET, 0.0)
    bf16: float = _figure("FLOP/s", "peak of the tensor cores in bf16, without sparsity", _DATA_SHEET, 0.0)
    fp32: float = _figure("FLOP/s", "peak in fp32, outside of the tensor cores (no TF32)", _DATA_SHEET, 0.0)
    memory: float = _figure("B/s", "memory bandwidth", _DATA_SHEET, 0.0)
    processors: int = _figure("", "streaming multiprocessors, each of which computes one tile at a time", _DATA_SHEET, 0)
    matmul_share: float = _figure(
        "of peak",
        "that a matrix product reaches while all its tiles are full",
        "780 of 989 TFLOP/s are the most that torch.mm was seen to reach on an H100 (gist Chillee/2ec89696, a shape of two full "
        "waves, power shifted to the tensor cores); less is assumed, since not every host is set so",
        0.73,
    )
    half_tile_share: float = _figure("of a full tile", "rate of a tile of half the size, 128×128 for 128×256", _GUESS, 0.87)
    small_tile_share: float = _figure("of a full tile", "rate of smaller tiles", _GUESS, 0.65)
    unaligned_share: float = _figure(
        "of aligned",
        "rate of a product with rows that do not begin at a multiple of 16 bytes",
        "our assumption; that these kernels are slower is in NVIDIA's Matrix Multiplication Background",
        0.5,
    )
    attention_share_64: float = _figure(
        "of peak",
        "of attention forwards, head dim 64, long sequences",
        "cuDNN as FlashAttention-3 (2407.08608, figure 5, causal), read off",
        0.42,
    )
    attention_share_128: float = _figure("of peak", "the same, head dim 128 and more", "2407.08608, figure 5, read off", 0.65)
    attention_backward: float = _figure("of forward", "rate of attention backwards", "2407.08608, figure 6, read off", 0.85)
    attention_length: float = _figure(
        "tokens", "length at which causal attention runs at half that rate", "2407.08608, figures 5 and 6, fitted by eye", 700.0
    )
    memory_share: float = _figure("of bandwidth", "that kernels reach which only read and write", _GUESS, 0.85)
    kernel_seconds: float = _figure("s", "start and end of each kernel", _GUESS, 2.5e-6)
    sustained_share: float = _figure(
        "of the above",
        "rates that a whole training step keeps up: clocks under the power limit, caches, gaps, exchanges that slow kernels",
        "FITTED to published figures of four trainers, whose scatter about it is −20 to +20 % (docs/planning.md)",
        0.82,
    )
    node_bandwidth: float = _figure(
        "B/s per GPU and direction",
        "of collectives within a node",
        "H100: 370 of 450 GB/s after NCCL's protocol (its maintainers in nccl-tests#212)",
        370e9,
    )
    node_all_reduce: float = _figure(
        "B/s",
        "bus bandwidth of an all-reduce within a node, which NVLink's switches help to add up",
        "480 GB/s, nccl-tests#212",
        480e9,
    )


H100 = Device("h100", 80.0, 989e12, 67e12, 3.35e12, 132)
H200 = replace(H100, name="h200", gibibytes=140.0, memory=4.8e12)
A100 = Device(
    "a100",
    80.0,
    312e12,
    19.5e12,
    2.04e12,
    108,
    matmul_share=0.83,
    half_tile_share=0.95,
    attention_share_64=0.58,
    attention_share_128=0.62,
    attention_length=350.0,
    node_bandwidth=235e9,
    node_all_reduce=235e9,
)
DEVICES: dict[str, Device] = {device.name: device for device in (H100, H200, A100)}


@dataclass(frozen=True)
class Links:
    """What connects GPUs: a fast network inside each node (see `Device.node_bandwidth`), and one between nodes."""

    gpus_per_node: int = _figure("", "GPUs with fast links among themselves", "DGX and HGX systems", 8)
    network_gigabits: float = _figure("Gbit/s per GPU", "network between nodes", "InfiniBand NDR, an adapter per GPU", 400.0)
    network_share: float = _figure("of it", "that NCCL reaches", "46–48 of 50 GB/s (its maintainers in nccl-tests#290)", 0.94)
    start: float = _figure("s", "of any collective", "NCCL's own model, src/graph/tuning.cc, protocol Simple", 8.4e-6)
    node_hop: float = _figure("s", "to the next GPU of a ring within a node", "as above", 3.4e-6)
    network_hop: float = _figure("s", "to the next node", "as above", 14e-6)
    tree_share: float = _figure("of a ring", "bandwidth of an all-reduce along a tree", "as above", 0.9)

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise UserError(f"--gpus-per-node {self.gpus_per_node}: a node has at least one GPU")
        if not (self.network_gigabits > 0 and math.isfinite(self.network_gigabits)):
            raise UserError(
                f"--network {self.network_gigabits:g}: gigabits per second and GPU between nodes, above 0, such as 400"
            )

    @property
    def network(self) -> float:
        """Bytes per second that a GPU sends to another node."""
        return self.network_gigabits * 1e9 / 8 * self.network_share


@dataclass(frozen=True)
class Host:
    """The CPU that starts kernels."""

    kernel_seconds: float = _figure("s", "to start one kernel from PyTorch", _GUESS, 5e-6)
    hook_seconds: float = _figure(
        "s",
        "each time that ZeRO 3 stops at a module",
        "our assumption; about 0.12 ms on one 2.6 GHz core",
        1e-4,
    )
    micro_batch_seconds: float = _figure("s", "of DeepSpeed's engine and ours per micro-batch", _GUESS, 1e-3)
    step_seconds: float = _figure("s", "per step, while the GPU waits: gradient norm, learning rate, loop", _GUESS, 3e-3)


@dataclass(frozen=True)
class Group:
    """Ranks that exchange something."""

    ranks: int
    in_node: int
    """How many of them share a node."""


@dataclass(frozen=True)
class Hardware:
    """A cluster of GPUs of one kind."""

    device: Device = H100
    links: Links = field(default_factory=Links)
    host: Host = field(default_factory=Host)
    zero3_overlap: float = _figure(
        "of forward and backward", "that can hide what ZeRO 3 gathers and scatters (its overlap_comm)", _GUESS, 0.8
    )

    hides_exchanges = True
    """Whether an exchange and a kernel run at the same time."""

    @property
    def kernel_host_seconds(self) -> float:
        return self.host.kernel_seconds

    @property
    def micro_batch_seconds(self) -> float:
        return self.host.micro_batch_seconds

    @property
    def hook_seconds(self) -> float:
        return self.host.hook_seconds

    @property
    def step_seconds(self) -> float:
        return self.host.step_seconds

    def group(self, axis: Axis, data: int, tensor: int) -> Group:
        """Who exchanges along an axis: tensor-parallel ranks are neighbours, then come data-parallel ones, then stages."""
        node = self.links.gpus_per_node
        if axis == "tensor":
            return Group(tensor, min(tensor, node))
        if axis == "data":
            return Group(data, max(1, min(data, node // tensor)))
        return Group(2, 2 if 2 * data * tensor <= node else 1)

    def compute(self, work: Matmul | Attention | Sweep) -> float:
        """Seconds of one operation on the GPU."""
        if isinstance(work, Matmul):
            seconds = _matmul_seconds(self.device, work)
        elif isinstance(work, Attention):
            seconds = _attention_seconds(self.device, work)
        else:
            seconds = work.bytes / (self.device.memory * self.device.memory_share) + work.kernels * self.device.kernel_seconds
        return seconds / self.device.sustained_share

    def exchange(self, exchange: Exchange, group: Group) -> float:
        """Seconds of one exchange that nothing disturbs."""
        if group.ranks == 1:
            return 0.0
        return _exchange_seconds(self, exchange.kind, exchange.bytes, group)


@functools.lru_cache(maxsize=100_000)
def _matmul_seconds(device: Device, work: Matmul) -> float:
    """The best of the tilings: tiles go over the processors in waves, of which the last may be nearly empty, and tiles at the
    border are computed in full. A product with few tiles is split along its inner dimension, and its parts are added up. Never
    faster than its matrices pass through memory."""
    peak = device.bf16 if work.element < 4 else device.fp32
    share = device.matmul_share if work.element < 4 else 1.0
    aligned = all(size * work.element % _ALIGNMENT == 0 for size in (work.columns, work.inner, work.rows))
    per_processor = peak * share * (1.0 if aligned else device.unaligned_share) / device.processors
    shares = {256 * 128: 1.0, 128 * 128: device.half_tile_share}
    bandwidth = device.memory * device.memory_share
    best = math.inf
    for rows, columns in _TILES:
        tiles = -(-work.rows // rows) * -(-work.columns // columns)
        rate = per_processor * shares.get(rows * columns, device.small_tile_share)
        for split in _SPLITS:
            waves = -(-tiles * split // device.processors)
            inner = padded(-(-work.inner // split), _INNER)
            seconds = max(waves * 2.0 * rows * columns * inner / rate, work.bytes / bandwidth)
            if split > 1:  # the parts are written and read in fp32
                seconds += 8.0 * split * work.rows * work.columns / bandwidth
            best = min(best, seconds)
    return best + device.kernel_seconds


@functools.lru_cache(maxsize=100_000)
def _attention_seconds(device: Device, work: Attention) -> float:
    head_dim = next((known for known in _HEAD_DIMS if known >= work.head_dim), padded(work.head_dim, 64))
    if work.element < 4:
        place = min(1.0, (head_dim - 64) / 64)
        share = device.attention_share_64 + place * (device.attention_share_128 - device.attention_share_64)
        rate = device.bf16 * share * (device.attention_backward if work.backward else 1.0)
    else:  # no tensor cores
        rate = device.fp32 * 0.5
    rate *= work.length / (work.length + device.attention_length)
    bandwidth = device.memory * device.memory_share
    return max(work.flops * head_dim / work.head_dim / rate, work.bytes / bandwidth) + device.kernel_seconds


@functools.lru_cache(maxsize=100_000)
def _exchange_seconds(hardware: Hardware, kind: Collective, size: float, group: Group) -> float:
    """A ring at the bandwidth of its narrowest link, with a hop per step. Between nodes each GPU of the group that a node has
    brings its own adapter. An all-reduce may also go up and down a tree over the nodes, which has far fewer hops."""
    device, links = hardware.device, hardware.links
    nodes = math.ceil(group.ranks / group.in_node)
    if nodes == 1:
        bandwidth = device.node_all_reduce if kind == "all_reduce" and group.ranks > 2 else device.node_bandwidth
    else:
        bandwidth = min(device.node_bandwidth, links.network * group.in_node)
    if bandwidth == 0:
        return math.inf
    sent = volume(kind, size, group.ranks)
    if kind == "send":
        return links.start + (links.network_hop if nodes > 1 else links.node_hop) + sent / bandwidth
    rounds = 2 if kind == "all_reduce" else 1
    hops = rounds * ((group.ranks - nodes) * links.node_hop + (nodes if nodes > 1 else 0) * links.network_hop)
    ring = hops + sent / bandwidth
    if kind != "all_reduce":
        return links.start + ring
    climb = math.ceil(math.log2(nodes)) * links.network_hop + (group.in_node - 1) * links.node_hop
    tree = 2 * climb + sent / (bandwidth * (links.tree_share if nodes > 1 else 1.0))
    return links.start + min(ring, tree)


# --- The figures as text.


@dataclass(frozen=True)
class Assumption:
    """One figure of the model."""

    part: str
    name: str
    value: str
    meaning: str
    source: str


def assumptions(hardware: Hardware) -> Iterator[Assumption]:
    """Every figure on which predictions for this hardware rest."""
    for part, owner in (
        (hardware.device.name, hardware.device),
        ("links", hardware.links),
        ("host", hardware.host),
        ("ZeRO", hardware),
    ):
        for entry in fields(owner):
            if "unit" in entry.metadata:
                yield _assumption(part, entry, getattr(owner, entry.name))


def _assumption(part: str, entry: Field[Any], value: float) -> Assumption:
    return Assumption(
        part, entry.name, _amount(value, entry.metadata["unit"]), entry.metadata["meaning"], entry.metadata["source"]
    )


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e6:g} µs" if value < 1e-3 else f"{value * 1e3:g} ms"
    if value >= 1e12:
        return f"{value / 1e12:g} T{unit}"
    if value >= 1e9:
        return f"{value / 1e9:g} G{unit}"
    return f"{value:g} {unit}".rstrip()


def device_named(name: str) -> Device:
    """Raises UserError for one that is not known."""
    if name not in DEVICES:
        raise UserError(f"--gpu {name}: not known; choose one of {', '.join(DEVICES)}")
    return DEVICES[name]
