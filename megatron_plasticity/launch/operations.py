"""What one process does in a training step, kernel by kernel: matrix products, attention, passes over memory, exchanges.

Counted on the config, in the order of `models/transformer.py`, `models/loss.py`, `parallel/tensor.py` and DeepSpeed 0.19; how
long it takes is said elsewhere (`launch/cost.py`). No tensor is made and torch is not imported.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_plasticity.config.deepspeed import accumulation_steps, effective_zero_stage
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import TrainingRecipe
from megatron_plasticity.launch.memory import BYTES, FP32, LOSS_PIECE, LOSS_ROWS, stage_parameter_count
from megatron_plasticity.models.families import FAMILIES
from megatron_plasticity.models.partition import stage_layers

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]
Axis = Literal["tensor", "data", "pipeline"]
Role = Literal["forward", "input", "weight"]

_LOSS_ROWS, _LOSS_PIECE = LOSS_ROWS["cuda"], LOSS_PIECE["cuda"]
# DeepSpeed's defaults in elements, by their names under `zero_optimization`.
_REUSE_DISTANCE = 1e9  # stage3_max_reuse_distance
_PERSISTENT = 1e5  # stage3_param_persistence_threshold
_MODULES_OF_A_BLOCK = 25  # hook points included
_ADAMW_BYTES = 7 * FP32
"""Weight, gradient and two moments are read, weight and moments written."""


@dataclass(frozen=True)
class Matmul:
    """A product of matrices, [rows, inner] · [inner, columns]."""

    rows: int
    columns: int
    inner: int
    element: int
    """Bytes of a number."""
    role: Role = "forward"
    """Of y = x·Wᵀ: y itself, the gradient of its input, or the gradient of W (whose inner dimension are the tokens)."""

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.inner

    @property
    def bytes(self) -> float:
        """Each matrix once."""
        return float(self.element * (self.rows * self.inner + self.inner * self.columns + self.rows * self.columns))


@dataclass(frozen=True)
class Attention:
    """Causal attention of one layer, in one kernel forwards and one backwards."""

    sequences: int
    length: int
    query_heads: int
    kv_heads: int
    head_dim: int
    element: int
    backward: bool = False

    @property
    def products(self) -> int:
        """Matrix products per head: scores and mixing forwards; backwards the scores anew, and four gradients."""
        return 5 if self.backward else 2

    @property
    def flops(self) -> float:
        """Of what causality leaves, half of each product."""
        return self.products * self.sequences * self.query_heads * float(self.length) ** 2 * self.head_dim

    @property
    def bytes(self) -> float:
        """Queries and outputs, keys and values; backwards those and their gradients."""
        once = self.sequences * self.length * self.head_dim * (2 * self.query_heads + 2 * self.kv_heads)
        return float(self.element * once * (2 if self.backward else 1))


@dataclass(frozen=True)
class Sweep:
    """Kernels that do little but read and write memory."""

    name: str
    """What is computed; kernels of one name touch as many bytes per second."""
    bytes: float
    """Read and written."""
    kernels: int = 1
    numbers: float = 0.0
    """Of the tensor that it goes over."""
    width: int = 0
    """Length of a row, where it works row by row."""


@dataclass(frozen=True)
class Exchange:
    """A collective, or one message to the next stage of a pipeline."""

    kind: Collective
    axis: Axis
    bytes: float
    """Of the whole tensor: before a reduce-scatter, after an all-gather."""


@dataclass(frozen=True)
class Beside:
    """An exchange that runs while something else is computed."""

    exchange: Exchange
    work: tuple[Work, ...]


@dataclass(frozen=True)
class Repeated:
    """The same for each layer."""

    times: int
    work: tuple[Work, ...]


Work = Matmul | Attention | Sweep | Exchange | Beside | Repeated


def volume(kind: Collective, size: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring (Patarasuk & Yuan, 2009): an all-reduce is a reduce-scatter and an all-gather."""
    if kind == "send":
        return size
    return size * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)


@dataclass(frozen=True)
class Kernels:
    """Which kernels the model runs as: what is fused touches memory once. What is not runs as PyTorch's kernels one by one, of
    which RMSNorm, attention and AdamW are fused in any case."""

    blocks: bool = False
    """Norm and residual, rotary embedding, SwiGLU: one kernel each, as `engine.compile` makes them."""
    loss: bool = False
    """The loss reads the logits once, and once more to turn them into their gradient, as with `engine.compile`."""
    projections: bool = False
    """Projections that share an input are one product. Ours are not."""

    @classmethod
    def of(cls, recipe: TrainingRecipe) -> Kernels:
        """Those of our code."""
        return cls(blocks=recipe.engine.compile, loss=recipe.engine.compile)


FUSED = Kernels(blocks=True, loss=True, projections=True)


@dataclass(frozen=True)
class StageWork:
    """What a process of one pipeline stage does."""

    forward: tuple[Work, ...]
    """Of one micro-batch."""
    backward: tuple[Work, ...]
    """Of one micro-batch, recomputation included, until its gradients are in their buffers."""
    reduction: tuple[Work, ...]
    """Once per step: gradients over data-parallel ranks."""
    update: tuple[Work, ...]
    """Once per step: clipping, AdamW, weights back to all ranks."""
    message: Exchange | None
    """What passes between this stage and each neighbour, per micro-batch and direction; None without a pipeline."""
    gathers: tuple[Exchange, ...] = ()
    """Of ZeRO 3, per micro-batch: weights for the forward and the backward pass, and the scattering of gradients."""
    hooks: int = 0
    """Of ZeRO 3, per micro-batch: times that DeepSpeed's Python stops at a module to gather or let go of its weights."""


def step_work(
    model: ModelConfig, recipe: TrainingRecipe, data_parallel_size: int, kernels: Kernels | None = None
) -> list[StageWork]:
    """What each pipeline stage does in a step, first to last, for micro-batches of whole sequences. Raises ConfigError if the
    global batch cannot be split."""
    alike: dict[tuple[int, bool, bool], StageWork] = {}
    found = []
    for stage, layers in enumerate(stage_layers(model, recipe.parallel)):
        kind = (len(layers), stage == 0, stage == recipe.parallel.pipeline - 1)
        if kind not in alike:
            alike[kind] = _Stage(model, recipe, data_parallel_size, stage, len(layers), kernels or Kernels.of(recipe)).work()
        found.append(alike[kind])
    return found


def operations(work: Iterable[Work]) -> Iterator[Matmul | Attention | Sweep | Exchange]:
    """Every single operation."""
    for item in work:
        if isinstance(item, Beside):
            yield item.exchange
            yield from operations(item.work)
        elif isinstance(item, Repeated):
            for _ in range(item.times):
                yield from operations(item.work)
        else:
            yield item


class _Stage:
    """The shapes that the operations are made of, for one pipeline stage."""

    def __init__(self, model: ModelConfig, recipe: TrainingRecipe, ranks: int, stage: int, layers: int, kernels: Kernels) -> None:
        parallel = recipe.parallel
        self.model, self.recipe, self.ranks, self.kernels = model, recipe, ranks, kernels
        self.element = BYTES[recipe.engine.precision]
        self.zero_stage = effective_zero_stage(recipe.engine, parallel)
        self.accumulation = accumulation_steps(recipe.batch, ranks)
        self.layers = layers
        self.is_first, self.is_last = stage == 0, stage == parallel.pipeline - 1
        self.parameters = stage_parameter_count(model, parallel, stage)
        self.tensor, self.sequence = parallel.tensor, parallel.sequence
        self.tokens = recipe.batch.micro_batch_size * model.context_length
        self.residual_tokens = self.tokens // (parallel.tensor if parallel.sequence else 1)
        self.query = model.query_heads * model.head_dim // parallel.tensor
        self.kv = model.head_dim * max(1, model.kv_heads // parallel.tensor)
        self.mlp = model.mlp_hidden_size // parallel.tensor
        self.vocabulary = model.vocab_size // parallel.tensor

    def work(self) -> StageWork:
        layer, back = self._layer_forward(), self._layer_backward()
        if self.recipe.engine.activation_checkpointing:
            # torch recomputes until it has what the backward pass reads: the last projection's output only where a norm follows.
            followed = FAMILIES[self.model.family].norm_placement == "output"
            back = [*(layer if followed else layer[: layer.index(self._down())]), *back]
        forward = [*(self._embedding_forward() if self.is_first else []), Repeated(self.layers, tuple(layer))]
        backward = [Repeated(self.layers, tuple(back)), *(self._embedding_backward() if self.is_first else [])]
        if self.is_last:
            forward += [*self._norm_forward(), *self._head_forward()]
            backward = [*self._head_backward(), *self._norm_backward(), *backward]
        message = None
        if self.recipe.parallel.pipeline > 1:
            message = Exchange("send", "pipeline", self.element * self.residual_tokens * self.model.hidden_size)
        return StageWork(
            forward=tuple(forward),
            backward=(*backward, *self._accumulate()),
            reduction=tuple(self._reduction()),
            update=tuple(self._update()),
            message=message,
            gathers=tuple(self._gathers()),
            hooks=2 * (_MODULES_OF_A_BLOCK * self.layers + 4) if self.zero_stage == 3 else 0,
        )

    # --- A block.

    def _layer_forward(self) -> list[Work]:
        hidden = self.model.hidden_size
        return [
            *self._norm_forward(),
            *self._columns_forward((self.query, self.kv, self.kv)),
            *self._qk_norm(backward=False),
            *(self._rotary(width, backward=False) for width in (self.query, self.kv)),
            self._attention(backward=False),
            Matmul(self.tokens, hidden, self.query, self.element),
            *self._combine(),
            *self._residual_add(),
            *self._norm_forward(),
            *self._columns_forward((self.mlp, self.mlp)),
            self._swiglu(backward=False),
            self._down(),
            *self._combine(),
            *self._residual_add(),
        ]

    def _down(self) -> Matmul:
        return Matmul(self.tokens, self.model.hidden_size, self.mlp, self.element)

    def _layer_backward(self) -> list[Work]:
        return [
            *self._residual_add(),
            *self._norm_backward(),
            *self._combine_backward(),
            *self._rows_backward(self.mlp),
            self._swiglu(backward=True),
            *self._columns_backward((self.mlp, self.mlp)),
            *self._residual_add(),
            *self._norm_backward(),
            *self._combine_backward(),
            *self._rows_backward(self.query),
            self._attention(backward=True),
            *(self._rotary(width, backward=True) for width in (self.query, self.kv)),
            *self._qk_norm(backward=True),
            *self._columns_backward((self.query, self.kv, self.kv)),
        ]

    def _norm_forward(self) -> list[Work]:
        count = self.residual_tokens * self.model.hidden_size
        # Fused, the norm reads the two addends of the residual stream and writes their sum as well.
        return [Sweep("norm", count * self.element * (4 if self.kernels.blocks else 2), 1, count, self.model.hidden_size)]

    def _norm_backward(self) -> list[Work]:
        """One kernel reads gradient and input and writes the input's gradient, one reads both for the gain's."""
        count = self.residual_tokens * self.model.hidden_size
        each = self.element * (6 if self.kernels.blocks else 5)
        work: list[Work] = [Sweep("norm backward", count * each, 2, count, self.model.hidden_size)]
        if self.sequence:
            work.append(Exchange("all_reduce", "tensor", FP32 * self.model.hidden_size))
        return work

    def _residual_add(self) -> list[Work]:
        """Forwards the sum, backwards that of the two gradients."""
        count = self.residual_tokens * self.model.hidden_size
        return [] if self.kernels.blocks else [self._add(count)]

    def _add(self, numbers: int) -> Sweep:
        return Sweep("add", 3 * self.element * numbers, 1, numbers)

    def _qk_norm(self, backward: bool) -> list[Work]:
        if not FAMILIES[self.model.family].qk_norm:
            return []
        name, found = f"norm{' backward' if backward else ''}", list[Work]()
        for width in (self.query, self.kv):
            count = self.tokens * width
            if self.tensor == 1:
                found.append(Sweep(name, count * self.element * (5 if backward else 2), 2 if backward else 1, count, width))
                continue
            # The mean square spans the ranks, so there is no kernel for it: six in fp32, and twice as many backwards.
            each = 2 * (self.element + FP32) + 7 * FP32
            found.append(Sweep(f"split {name}", count * each * (2 if backward else 1), 12 if backward else 6, count, width))
            found.append(Exchange("all_reduce", "tensor", FP32 * self.tokens))
        return found

    def _rotary(self, width: int, backward: bool) -> Sweep:
        """Forwards a roll, two products with fp32 tables, their sum, and back to the model's numbers; backwards the same in
        reverse, with the gradient of each product cast by itself. What PyTorch's kernels read and write per number."""
        element, name = self.element, f"rotary{' backward' if backward else ''}"
        if self.kernels.blocks:
            return Sweep(name, 2 * element * self.tokens * width, 1, self.tokens * width, width)
        cast = element + FP32 if element < FP32 else 0
        if backward:
            each, kernels = cast + 2 * (2 * FP32 + cast) + 2 * element + 3 * element, 4 + (3 if cast else 0)
        else:
            each, kernels = 2 * element + 2 * (element + FP32) + 3 * FP32 + cast, 4 + (1 if cast else 0)
        return Sweep(name, each * self.tokens * width, kernels, self.tokens * width, width)

    def _attention(self, backward: bool) -> Attention:
        batch, head = self.recipe.batch.micro_batch_size, self.model.head_dim
        return Attention(batch, self.model.context_length, self.query // head, self.kv // head, head, self.element, backward)

    def _swiglu(self, backward: bool) -> Sweep:
        """SiLU and product; backwards two products and SiLU's gradient."""
        count = self.tokens * self.mlp
        each, kernels = ((5, 1) if backward else (3, 1)) if self.kernels.blocks else ((9, 3) if backward else (5, 2))
        return Sweep(f"swiglu{' backward' if backward else ''}", each * self.element * count, kernels, count, self.mlp)

    # --- Projections, and what tensor-parallel ranks exchange around them (`parallel/tensor.py`).

    def _columns_forward(self, widths: Sequence[int]) -> list[Work]:
        widths = (sum(widths),) if self.kernels.projections else widths
        products = [Matmul(self.tokens, width, self.model.hidden_size, self.element) for width in widths]
        return [*self._gather_sequence(), *products]

    def _columns_backward(self, widths: Sequence[int]) -> list[Work]:
        """The gradients of the input, summed over the projections that share it, and of the weights. With tensor parallelism
        the exchange of the first runs beside the products of the second."""
        hidden = self.model.hidden_size
        widths = (sum(widths),) if self.kernels.projections else widths
        of_input: list[Work] = [Matmul(self.tokens, hidden, width, self.element, "input") for width in widths]
        of_input += [self._add(self.tokens * hidden)] * (len(widths) - 1)
        of_weights: list[Work] = [Matmul(width, hidden, self.tokens, self.element, "weight") for width in widths]
        if self.tensor == 1:
            return [*of_input, *of_weights]
        if self.sequence:
            gather = Exchange("all_gather", "tensor", self.element * self.tokens * hidden)
            scatter = Exchange("reduce_scatter", "tensor", self.element * self.tokens * hidden)
            return [Beside(gather, tuple(of_input)), Beside(scatter, tuple(of_weights))]
        return [*of_input, Beside(Exchange("all_reduce", "tensor", self.element * self.tokens * hidden), tuple(of_weights))]

    def _rows_backward(self, width: int) -> list[Work]:
        """Backwards through a projection that is cut by its inputs."""
        hidden = self.model.hidden_size
        return [
            Matmul(self.tokens, width, hidden, self.element, "input"),
            Matmul(hidden, width, self.tokens, self.element, "weight"),
        ]

    def _combine(self) -> list[Work]:
        if self.tensor == 1:
            return []
        count = self.tokens * self.model.hidden_size
        if not self.sequence:
            return [Exchange("all_reduce", "tensor", self.element * count)]
        return [self._copy(count), Exchange("reduce_scatter", "tensor", self.element * count)]

    def _copy(self, numbers: int) -> Sweep:
        return Sweep("copy", 2 * self.element * numbers, 1, numbers)

    def _combine_backward(self) -> list[Work]:
        return self._gather_sequence()

    def _gather_sequence(self) -> list[Work]:
        if not self.sequence:
            return []
        count = self.tokens * self.model.hidden_size
        return [Exchange("all_gather", "tensor", self.element * count), self._copy(count)]

    # --- Embedding, head, loss.

    def _embedding_forward(self) -> list[Work]:
        count, width = self.tokens * self.model.hidden_size, self.model.hidden_size
        if self.tensor == 1:
            return [Sweep("embedding", 2 * self.element * count, 1, count, width)]
        return [Sweep("embedding", 4 * self.element * count, 5, count, width), *self._combine()]

    def _embedding_backward(self) -> list[Work]:
        """A gradient of the matrix's size is filled with zeros, and rows are added to it."""
        width, element = self.model.hidden_size, self.element
        size = element * width * (self.vocabulary + 3 * self.tokens)
        return [*self._combine_backward(), Sweep("embedding backward", size, 4, self.tokens * width, width)]

    def _head_forward(self) -> list[Work]:
        """Rows of logits, a piece at a time: their log-sum-exp (a cast to fp32, maximum, difference, exponential and sum), their
        gradient (a cast, difference, exponential, product, and a cast back), and through the head to the gradients of its input
        and of its matrix, which is summed up in fp32."""
        hidden, vocabulary, element = self.model.hidden_size, self.vocabulary, self.element
        pieces = math.ceil(self.tokens / _LOSS_ROWS)
        rows = math.ceil(self.tokens / pieces)
        logits = float(rows) * vocabulary
        cast = element + FP32 if element < FP32 else 0
        if self.kernels.loss:
            bytes, kernels = (element, 2 * element), 1
        else:
            bytes, kernels = (cast + 6 * FP32, 2 * max(cast, FP32) + 6 * FP32), 6 * math.ceil(logits / _LOSS_PIECE)
        partition: list[Work] = [Sweep("loss", bytes[0] * logits, kernels, logits, vocabulary)]
        if self.tensor > 1:
            partition += [
                Exchange("all_reduce", "tensor", FP32 * rows),
                Exchange("all_reduce", "tensor", 2 * FP32 * rows),
            ]
        piece: list[Work] = [
            Matmul(rows, vocabulary, hidden, element),
            *partition,
            Sweep("loss gradient", bytes[1] * logits, kernels, logits, vocabulary),
            Matmul(rows, hidden, vocabulary, element, "input"),
            Matmul(vocabulary, hidden, rows, element, "weight"),
        ]
        if pieces > 1:  # the sum is read and written
            piece.append(Sweep("accumulate", 2 * FP32 * hidden * vocabulary))
        return [*self._gather_sequence(), Repeated(pieces, tuple(piece)), *self._combine()]

    def _head_backward(self) -> list[Work]:
        """Both gradients are there; they are scaled, and that of the matrix is cast."""
        inputs = self.residual_tokens * self.model.hidden_size
        return [self._copy(inputs), self._copy(self.model.hidden_size * self.vocabulary)]

    # --- What DeepSpeed does with gradients and weights.

    @property
    def _tensors(self) -> int:
        """Parameters of this stage that are tensors of their own, for the kernels that go over each."""
        return 9 * self.layers + (2 if FAMILIES[self.model.family].qk_norm else 0) * self.layers + 2

    @property
    def _is_bf16_optimizer(self) -> bool:
        return self.zero_stage == 1 and self.element < FP32

    def _accumulate(self) -> list[Work]:
        """What becomes of a micro-batch's gradients. bf16 at stage 1: cast and added to fp32 ones; from the second micro-batch on
        also set to zero first, and added to by the backward pass. Stage 2 and 3: into a bucket, which is reduced when full."""
        count, element = self.parameters, self.element
        later = (self.accumulation - 1) / self.accumulation
        if self._is_bf16_optimizer:
            return [
                Sweep("accumulate", count * (element + 4 * FP32 + later * 4 * element), round(self._tensors * (2 + 2 * later)))
            ]
        if self.zero_stage < 2:
            return [Sweep("accumulate", count * later * 3 * element, round(self._tensors * later))] if later else []
        part = count / self.ranks
        bucket = Sweep("accumulate", count * 2 * element + count * (element + FP32 if element < FP32 else 0), 2 * self._tensors)
        add = Sweep("accumulate", part * 3 * FP32, self._tensors)
        if self.zero_stage == 3:  # the reduce-scatter is in `gathers`
            return [bucket, Sweep("accumulate", count * 4 * FP32, 4), add]
        return [bucket, *self._all_reduced(), add]

    def _all_reduced(self) -> list[Work]:
        """Of all gradients in fp32: divided by the ranks, summed, and copied back."""
        if self.ranks == 1:
            return []
        count = FP32 * self.parameters
        return [Sweep("accumulate", 4 * count, 2), Exchange("all_reduce", "data", count)]

    def _reduction(self) -> list[Work]:
        return self._all_reduced() if self.zero_stage < 2 else []

    def _update(self) -> list[Work]:
        """BF16_Optimizer takes the norm of the gradients of all ranks, clips all of them, and sets all to zero; the other stages
        do so with their part, which they flatten first."""
        part = self.parameters / (1 if self.zero_stage == 0 else self.ranks)
        counted = self.parameters if self._is_bf16_optimizer else part
        work: list[Work] = [
            # fp32 at stage 0: DeepSpeed clips, and does not say by which norm, so the engine takes it too.
            *[Sweep("gradient norm", FP32 * counted, self._tensors, counted)] * (2 if self.zero_stage == 0 else 1),
            Sweep("clip", 2 * FP32 * counted, self._tensors, counted),
            Sweep("adamw", _ADAMW_BYTES * part, 2, part),
        ]
        if self.zero_stage > 0:
            work.append(Sweep("copy", 2 * FP32 * (part if not self._is_bf16_optimizer else 0) + (FP32 + self.element) * part, 2))
        work.append(Sweep("zero", FP32 * counted, 2, counted))
        if self.ranks > 1:
            work.append(Exchange("all_reduce", "data", FP32))  # the norm
            if self.zero_stage in (1, 2):
                work.append(Exchange("all_gather", "data", self.element * self.parameters))
        return work

    def _gathers(self) -> list[Exchange]:
        """ZeRO 3 gathers a micro-batch's weights for the forward pass and again for the backward pass, except for what is needed
        again so soon that it is kept, and except for small parameters; gradients are scattered in fp32."""
        if self.zero_stage < 3 or self.ranks == 1:
            return []
        passes = 2 if self.parameters > _REUSE_DISTANCE else 1
        weights = Exchange("all_gather", "data", self.element * self.parameters)
        return [weights] * passes + [Exchange("reduce_scatter", "data", FP32 * self.parameters)]


@functools.cache
def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple
