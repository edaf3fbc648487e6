"""How many bytes one process of a training run holds, by arithmetic on the config: no tensor is made and torch is not imported.

The formula follows the code that runs: what `models/` keeps for the backward pass, and the buffers that DeepSpeed 0.19 makes for
each ZeRO stage. `docs/memory.md` explains it and says what it was measured against.

Sources: ZeRO (Rajbhandari et al., 1910.02054, section 3), tensor parallelism (Shoeybi et al., 1909.08053), sequence parallelism
and activations per layer (Korthikanti et al., 2205.05198, section 4).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from typing import Literal

from megatron_plasticity.config.deepspeed import accumulation_steps, effective_zero_stage
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.training import TrainingRecipe
from megatron_plasticity.models.families import FAMILIES
from megatron_plasticity.models.partition import sharding, stage_layers, stage_parameters
from megatron_plasticity.models.sizes import HEAD, TOKEN_EMBEDDING, parameter_shapes

Device = Literal["cuda", "cpu"]

FP32 = 4
BYTES: dict[str, int] = {"fp32": FP32, "bf16": 2}

# DeepSpeed's defaults in elements, by their names under `zero_optimization`.
_ZERO_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_max_live_parameters": 1e9,
    "stage3_param_persistence_threshold": 1e5,
    "sub_group_size": 1e9,
}
_ALL_REDUCE = 5e8  # its MEMORY_OPT_ALLREDUCE_SIZE, which no setting changes

# Rows of logits that there are at once, and elements of them that are worked on in fp32 at once (`models/loss.py`).
LOSS_ROWS: dict[Device, int] = {"cpu": 1024, "cuda": 4096}
LOSS_PIECE: dict[Device, int] = {"cpu": 2**17, "cuda": 2**26}


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at one moment, by what they are for."""

    weights: float = 0.0
    """Parameters as the forward pass reads them."""
    gradients: float = 0.0
    """Gradients in the model's precision, and those that are accumulated in fp32."""
    optimizer: float = 0.0
    """fp32 master weights (where they are apart from the weights) and AdamW's two moments."""
    buffers: float = 0.0
    """What DeepSpeed and the optimizer step make beside them: reduction buckets, flat copies, gathered weights."""
    activations: float = 0.0
    """What is kept for the backward pass, and what the backward pass makes on its way."""
    loss: float = 0.0
    """Some rows of logits, what the cross-entropy makes beside them, and the gradients that it computes at once."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class StageMemory:
    """Memory of a process of one pipeline stage: of the data-parallel rank that needs most, where they differ."""

    stage: int
    between_steps: Memory
    """After an optimizer step, before the next."""
    moments: dict[str, Memory]
    """The moments of a step at which most memory can be in use, by name."""

    @property
    def peak(self) -> Memory:
        """The most that is in use at one moment of a step."""
        return max(self.moments.values(), key=lambda memory: memory.total)

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: self.moments[name].total)


def memory(model: ModelConfig, recipe: TrainingRecipe, data_parallel_size: int, device: Device = "cuda") -> list[StageMemory]:
    """Memory per process of each pipeline stage, first to last, for micro-batches of whole sequences.

    Allocator rounding, CUDA kernels' workspaces, NCCL's buffers and the CUDA context are not in it. `device` matters where torch
    has other kernels: on a CPU RMSNorm keeps fp32 copies and AdamW is not fused. Raises ConfigError if the global batch cannot be
    split.
    """
    return [_Stage(model, recipe, data_parallel_size, stage, device).memory() for stage in range(recipe.parallel.pipeline)]


def largest_stage(stages: list[StageMemory]) -> StageMemory:
    """The stage whose processes need most memory; a layout fits if this one does."""
    return max(stages, key=lambda stage: stage.peak.total)


def stage_parameter_count(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Parameters that each process of a stage holds."""
    return sum(_parameter_sizes(_Split.of(model, parallel), stage).values())


@dataclass(frozen=True)
class _Split:
    """A model cut into stages with stated layers and into tensor-parallel parts."""

    model: ModelConfig
    layers: tuple[int, ...]
    tensor: int

    @classmethod
    def of(cls, model: ModelConfig, parallel: ParallelConfig) -> _Split:
        layers = tuple(len(layers) for layers in stage_layers(model, parallel))
        return cls(model, layers, parallel.tensor)


@functools.cache
def _parameter_sizes(split: _Split, stage: int) -> dict[str, int]:
    """Elements by name of what a process of a stage holds. Cached: a plan asks for the same split under many settings."""
    model = split.model
    parallel = ParallelConfig(pipeline=len(split.layers), tensor=split.tensor, layers_per_stage=split.layers)
    shapes = parameter_shapes(model)
    return {
        name: math.prod(sharding(name, model, split.tensor).shape(shapes[name]))
        for name in stage_parameters(stage, model, parallel)
    }


class _Stage:
    """The sizes that the formula is made of, for one pipeline stage."""

    def __init__(self, model: ModelConfig, recipe: TrainingRecipe, data_parallel_size: int, stage: int, device: Device) -> None:
        parallel = recipe.parallel
        self.model, self.recipe, self.stage = model, recipe, stage
        self.device: Device = device
        self.ranks = data_parallel_size
        self.zero_stage = effective_zero_stage(recipe.engine, parallel)
        self.bytes = BYTES[recipe.engine.precision]
        self.accumulation = accumulation_steps(recipe.batch, data_parallel_size)
        split = _Split.of(model, parallel)
        self.layers = split.layers[stage]
        self.is_first, self.is_last = stage == 0, stage == parallel.pipeline - 1
        self.sizes = _parameter_sizes(split, stage)
        self.parameters = sum(self.sizes.values())
        self.largest_parameter = max(self.sizes.values())
        self.tokens = recipe.batch.micro_batch_size * model.context_length
        self.residual_tokens = self.tokens / (parallel.tensor if parallel.sequence else 1)
        self.residual = self.bytes * self.residual_tokens * model.hidden_size
        """Bytes of a residual stream as one rank holds it."""

    def memory(self) -> StageMemory:
        states = self._states() + self._message_buffers()
        earlier, all_outputs = self._earlier_outputs(1), self._earlier_outputs(0)
        backward = states + earlier + self._held() + self._kept()
        moments = {
            "loss": backward + self._loss(),
            "backward pass in the head": backward + self._backward_of_the_head(),
            "backward pass in the last layer": backward + self._backward_of_a_layer(self.layers),
            "backward pass in the first layer": backward + self._backward_of_a_layer(1),
            "first bucket is reduced": backward + self._first_bucket(),
            "gradients are reduced": states + all_outputs + self._reduction(),
            "optimizer step": states + all_outputs + self._step(),
        }
        return StageMemory(self.stage, states + all_outputs, moments)

    # --- Weights, gradients, optimizer states: ZeRO divides by the data-parallel ranks what its stage partitions.

    def _states(self) -> Memory:
        count, part = self.parameters, self.parameters / self.ranks
        if self.zero_stage == 0:
            return Memory(weights=FP32 * count, optimizer=2 * FP32 * count)
        states = 3 * FP32 * part  # DeepSpeed keeps a master copy in fp32 too
        if self.zero_stage == 3:
            # The gradients' partition and the bucket are made once and kept; the bucket is in the format of communication, fp32.
            return Memory(self.bytes * (part + self._persistent), FP32 * part, states, FP32 * self._bucket)
        # BF16_Optimizer keeps the gradients of all its parameters in fp32.
        return Memory(self.bytes * count, FP32 * count if self._is_bf16_optimizer else 0, states)

    @property
    def _is_bf16_optimizer(self) -> bool:
        """DeepSpeed's optimizer for bf16 at stage 1; the other stages and fp32 have another one."""
        return self.zero_stage == 1 and self.recipe.engine.precision == "bf16"

    def _zero_setting(self, name: str) -> float:
        """A setting of DeepSpeed's, in elements."""
        stated = self.recipe.engine.deepspeed.get("zero_optimization", {}).get(name)
        return float(stated) if isinstance(stated, int | float) else _ZERO_DEFAULTS[name]

    @property
    def _bucket(self) -> float:
        """Elements of the buffer in which gradients are reduced; two of them where communication overlaps at stage 1 or 2."""
        if self.zero_stage == 0 or self._is_bf16_optimizer:
            return 0
        overlaps = self.recipe.engine.deepspeed.get("zero_optimization", {}).get("overlap_comm", False)
        return self._zero_setting("reduce_bucket_size") * (2 if overlaps and self.zero_stage < 3 else 1)

    @property
    def _persistent(self) -> float:
        """Elements of the small parameters that stage 3 leaves whole on every rank."""
        if self.ranks == 1:
            return 0
        threshold = self._zero_setting("stage3_param_persistence_threshold")
        return sum(size for size in self.sizes.values() if size < threshold)

    def _held(self) -> Memory:
        """What the micro-batches before leave behind: gradients in the model's precision up to stage 1, partitioned in fp32 at
        stage 2; at stage 1 in fp32 the bucket too, which is freed when gradients are reduced."""
        if self.accumulation == 1 or self.zero_stage == 3:
            return Memory()
        if self.zero_stage == 2:
            return Memory(gradients=self._fp32_part)
        return Memory(gradients=self.bytes * self.parameters, buffers=self.bytes * self._bucket)

    @property
    def _fp32_part(self) -> float:
        """Bytes of this rank's part of a tensor of all parameters in fp32."""
        return FP32 * self.parameters / self.ranks

    @property
    def _new_partition(self) -> float:
        """Bytes of the gradient partition that stage 2 makes in a backward pass: in bf16 the held one is added to, in fp32 it is
        made anew in each."""
        is_new = self.accumulation == 1 or self.bytes == FP32
        return self._fp32_part if self.zero_stage == 2 and is_new else 0

    def _gathered_weights(self) -> float:
        """Bytes of weights that stage 3 has gathered. It keeps them for as long as its limits allow
        (`stage3_max_live_parameters`, `stage3_max_reuse_distance`)."""
        if self.zero_stage < 3 or self.ranks == 1:
            return 0
        return self.bytes * (min(self.parameters, self._zero_setting("stage3_max_live_parameters")) - self._persistent)

    @property
    def _bucket_copies(self) -> float:
        """Bytes of the flat copy of a full bucket that is sent, at stage 2 in bf16 of another one in fp32."""
        each = FP32 + (self.bytes if self.zero_stage == 2 and self.bytes < FP32 else 0)
        return each * min(self.parameters, self._bucket)

    def _first_bucket(self) -> Memory:
        """From stage 2 on gradients are reduced as soon as they fill the bucket: the head's first, then the last layers'. The
        activations of those layers are gone."""
        if self.zero_stage < 2:
            return Memory()
        outside = self.sizes.get(HEAD, 0) + self.sizes.get(TOKEN_EMBEDDING, 0)
        done = min(1, max(0, self._bucket - outside / 2) / (self.parameters - outside))
        freed = Memory(activations=-done * self._kept().activations, buffers=self._bucket_copies)
        return self._backward_of_a_layer(self.layers) + freed

    def _reduction(self) -> Memory:
        """The backward pass has ended, and gradients are averaged over the data-parallel ranks."""
        count, part = self.parameters, self.parameters / self.ranks
        if self.zero_stage == 0:
            return Memory(gradients=FP32 * count, buffers=FP32 * min(count, _ALL_REDUCE))
        if self._is_bf16_optimizer:
            # One parameter at a time is cast and added to the fp32 gradients; then a flat tensor per group is reduced, in place
            # if there is a single group.
            groups = 1 if self.recipe.optimizer.decay.scope == "all" else 2
            copy = min(count, _ALL_REDUCE) if groups > 1 and self.ranks > 1 else 0
            return Memory(gradients=2 * count, buffers=FP32 * max(self.largest_parameter, copy))
        if self.zero_stage == 1:
            return Memory(gradients=FP32 * (count + part), buffers=FP32 * self._bucket)
        if self.zero_stage == 2:
            gradients = self._held().gradients + self._new_partition
            return Memory(gradients=gradients, buffers=self.bytes * self._bucket + self._bucket_copies)
        return Memory(buffers=self._gathered_weights() + self._bucket_copies)

    def _step(self) -> Memory:
        """AdamW on this rank's part; DeepSpeed puts the gradients together in one flat tensor first."""
        part = self.parameters / self.ranks
        # torch's AdamW without fusion makes √v and the step size; per parameter at stage 0, per flat group above.
        unfused = 2 * FP32 * (0 if self.device == "cuda" else self.largest_parameter if self.zero_stage == 0 else part)
        if self.zero_stage == 0:
            return Memory(gradients=FP32 * self.parameters, buffers=unfused)
        if self._is_bf16_optimizer:
            return Memory(gradients=2 * self.parameters, buffers=unfused)
        if self.zero_stage == 3:
            # The partitioned gradients count already; a sub-group at a time is flattened and stepped.
            return Memory(buffers=(FP32 * part + unfused) * min(1, self._zero_setting("sub_group_size") / part))
        flattened = 0 if self.zero_stage == 2 and self.bytes < FP32 else FP32 * part
        return Memory(gradients=FP32 * part, buffers=max(flattened, unfused))

    # --- What DeepSpeed's pipeline engine holds on to.

    def _message_buffers(self) -> Memory:
        """What comes from the stage before, and the gradient of what went to the next, each arrive in a buffer that is kept."""
        return Memory(buffers=self.residual * ((not self.is_first) + (not self.is_last)))

    def _earlier_outputs(self, overwritten: int) -> Memory:
        """The last stage has two slots, and keeps in each the output, input and input's gradient of an earlier micro-batch until
        the slot is used again; `overwritten` of them are not there."""
        if self.recipe.parallel.pipeline == 1 or not self.is_last:
            return Memory()
        slots = min(2, self.accumulation) - overwritten
        return Memory(activations=slots * 3 * self.residual)

    # --- Activations: what the backward pass will read, in the order of `models/transformer.py`.

    def _kept(self) -> Memory:
        """Activations of every micro-batch under way: under the 1F1B schedule a stage has as many of them as there are stages
        from it to the last (2104.04473, section 2.2)."""
        under_way = min(self.recipe.parallel.pipeline - self.stage, self.accumulation)
        each = self.layers * self._kept_by_a_layer
        if self.recipe.parallel.pipeline > 1 and not self.is_last:
            each += self.residual  # the output, which is held until it has been sent and its gradient is back
        return Memory(activations=under_way * each, buffers=self._gathered_weights())

    @property
    def _kept_by_a_layer(self) -> float:
        return self.residual if self.recipe.engine.activation_checkpointing else self._layer()

    def _layer(self) -> float:
        """Bytes that one block keeps."""
        model, tensor = self.model, self.recipe.parallel.tensor
        query, kv = model.query_heads * model.head_dim / tensor, self._kv_width
        # Both norms, and what enters the two groups of projections behind or before them.
        block = 2 * (self._norm(model.hidden_size, self.residual_tokens) + self.residual)
        # Attention: q, k, v, output, and its log-sum-exp in fp32.
        block += self.tokens * (self.bytes * (2 * query + 2 * kv) + FP32 * model.query_heads / tensor)
        if FAMILIES[model.family].qk_norm:
            split = tensor > 1
            block += self._norm(query, self.tokens, split) + self._norm(kv, self.tokens, split)
        # MLP: gate, its SiLU, up, and their product.
        return block + self.tokens * self.bytes * 4 * model.mlp_hidden_size / tensor

    @property
    def _kv_width(self) -> float:
        """Width of the keys that a rank holds; with more ranks than heads, several ranks hold each."""
        return self.model.head_dim * max(1, self.model.kv_heads / self.recipe.parallel.tensor)

    def _norm(self, width: float, tokens: float, split_over_heads: bool = False) -> float:
        """What an RMSNorm keeps: its input and a factor per token. Without a kernel of its own (on a CPU, and where the norm
        spans tensor-parallel ranks) that is the input and the normalised input, in fp32."""
        fused = self.device == "cuda" and not split_over_heads
        return tokens * (width * (self.bytes if fused else 2 * FP32) + FP32)

    def _backward_of_a_layer(self, left: int) -> Memory:
        """The backward pass is in the MLP of a layer, with this and the layers before it, `left` in all, still to do.

        Made on the way are the gradients of gate and up and of the residual stream, and the layer anew if it is recomputed. Of
        the weights' gradients, those of the head, of the layers done and of this layer's down projection are there.
        """
        model, parallel = self.model, self.recipe.parallel
        made = self.tokens * self.bytes * 2 * model.mlp_hidden_size / parallel.tensor + self.residual
        if parallel.sequence:
            made += self.bytes * self.tokens * model.hidden_size  # the gathered gradient
        if self.recipe.engine.activation_checkpointing:
            made += self._layer()
        activations = made - (self.layers - left) * self._kept_by_a_layer
        if self.zero_stage >= 2:  # once in the bucket a gradient is freed
            bucket = self.bytes * self._bucket if self.zero_stage == 2 else 0
            return Memory(gradients=self._new_partition, buffers=bucket, activations=activations)
        if self.accumulation > 1:  # gradients and bucket are there already
            return Memory(activations=activations)
        each = (self.parameters - self.sizes.get(HEAD, 0) - self.sizes.get(TOKEN_EMBEDDING, 0)) / self.layers
        down = model.hidden_size * model.mlp_hidden_size / parallel.tensor
        gradients = self.bytes * (self._head_size + (self.layers - left) * each + down)
        return Memory(gradients=gradients, buffers=self.bytes * self._bucket, activations=activations)

    @property
    def _head_size(self) -> int:
        """Parameters of the head, its own or the tied embedding's, on the stage that has it."""
        return self.sizes.get(HEAD, self.sizes.get(TOKEN_EMBEDDING, 0)) if self.is_last else 0

    def _backward_of_the_head(self) -> Memory:
        """The gradients that were computed with the loss are scaled, and that of the head cast."""
        if not self.is_last:
            return Memory()
        final = self._norm(self.model.hidden_size, self.residual_tokens) + self.residual
        if self.recipe.parallel.pipeline > 1:
            final += self.residual  # what the head has read is the stage's output
        summed = 0 if self._gradient_of_the_head == self.bytes else self._gradient_of_the_head * self._head_size
        return Memory(gradients=self.bytes * self._head_size, activations=final + self.residual, loss=summed)

    def _loss(self) -> Memory:
        """Final norm, what the head reads and its gradient, the head's gradient, and the last rows of logits: as logits, as their
        gradient, and in the pieces in which the cross-entropy works in fp32 (`models/loss.py`)."""
        if not self.is_last:
            return Memory()
        model, vocabulary = self.model, self.model.vocab_size / self.recipe.parallel.tensor
        whole = self.bytes * self.tokens * model.hidden_size
        read = self._norm(model.hidden_size, self.residual_tokens) + self.residual + self.residual
        if self.recipe.parallel.sequence:
            read += whole
        logits = min(self.tokens, LOSS_ROWS[self.device]) * vocabulary
        piece = min(logits, max(LOSS_PIECE[self.device], vocabulary))
        working = FP32 * piece * (2 if self.bytes < FP32 else 1)
        if self._gradient_of_the_head > self.bytes and self.device == "cpu":
            working = max(working, self.bytes * self._head_size)  # the product that is added to the sum
        gradients = whole + self._gradient_of_the_head * self._head_size
        return Memory(activations=read, loss=self.bytes * logits + working + gradients)

    @property
    def _gradient_of_the_head(self) -> int:
        """Bytes of a number in which the gradient of the head's matrix is summed up over rows of logits, if there are several."""
        return FP32 if self.tokens > LOSS_ROWS[self.device] else self.bytes
