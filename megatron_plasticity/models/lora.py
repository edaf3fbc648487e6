"""Low-rank adapters (LoRA, Hu et al., 2106.09685), put into our model by the library peft.

A projection's matrix W [outputs, inputs] is frozen, and W + (alpha/rank)·B·A is used in its place, with A [rank, inputs] and
B [outputs, rank]. B begins at zero, so training begins at the base model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import LoraConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.initialisation import parameter_seed
from megatron_plasticity.models.sizes import parameter_shapes
from megatron_plasticity.models.transformer import Transformer


@dataclass(frozen=True)
class Adapters:
    """What adapters are on a model, and what lies beneath them."""

    config: LoraConfig
    model: ModelConfig
    base: Mapping[str, Tensor]
    """Whole fp32 weights of the model without adapters, by name, on the CPU."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As `adapter_shapes`."""
        return adapter_shapes(self.config, self.model)

    def on(self, name: str) -> bool:
        """Whether the parameter of this name, as the base model has it, has an A and a B."""
        return _is_target(self.config, name)

    def merge(self, name: str, a: Tensor | None, b: Tensor | None) -> Tensor:
        """W + (alpha/rank)·B·A for the base's matrix W of this name, fp32, on the CPU; W itself where it has no A and B."""
        if a is None or b is None:
            return self.base[name]
        return torch.addmm(self.base[name], b.cpu(), a.cpu(), alpha=self.config.scaling)

    def attach(self, model: Transformer, seed: int) -> None:
        """Freeze `model`, which holds the base's weights, and put new adapters into it.

        Like initial weights, each A is a pure function of the seed and its name; its distribution is peft's default, uniform in
        ±1/√inputs. Raises UserError if peft is not installed.
        """
        peft = import_peft()
        settings = peft.LoraConfig(
            r=self.config.rank, lora_alpha=self.config.alpha, lora_dropout=0.0, target_modules=list(self.config.targets)
        )
        peft.inject_adapter_in_model(settings, model, low_cpu_mem_usage=True)  # without memory, so that nothing is drawn twice
        values = {name: _initial_value(name, shape, seed) for name, shape in self.shapes.items()}
        model.load_state_dict(values, strict=False, assign=True)


def adapter_shapes(lora: LoraConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all A and B by parameter name, each A before its B, in the order of the matrices that they belong to."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(model).items():
        if _is_target(lora, name):
            module = name.removesuffix(".weight")
            shapes[f"{module}.lora_A.default.weight"] = (lora.rank, shape[1])
            shapes[f"{module}.lora_B.default.weight"] = (shape[0], lora.rank)
    return shapes


def import_peft() -> ModuleType:
    """The library. Raises UserError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"lora: needs the package peft, which cannot be imported here ({error}); pip install 'megatron-plasticity[lora]'"
        ) from None
    return peft


def _is_target(lora: LoraConfig, name: str) -> bool:
    return name.endswith(tuple(f".{target}.weight" for target in lora.targets))


def _initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if ".lora_B." in name:
        return torch.zeros(shape)
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(parameter_seed(seed, name)))
