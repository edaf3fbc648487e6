"""Full fp32 weights and AdamW moments, in and out of DeepSpeed's optimizers, whatever the ZeRO stage.

With `models/partition.py`, which knows the pieces of tensor parallelism, and the process grid, which brings them together, this
is what makes our checkpoints free of the layout: a tensor is always whole and carries its parameter's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from megatron_plasticity.optim.adamw import create_moments, set_step

Moment = Literal["exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Moment, ...] = ("exp_avg", "exp_avg_sq")


def full_weight(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The fp32 master weight of what this process's tensor-parallel ranks hold, gathered over data-parallel ranks. A collective:
    these must all call it, for the same parameters in the same order.

    The result may share memory with the weight itself (stage 0); clone it to keep it.
    """
    if not engine.zero_optimization() and not engine.bfloat16_enabled():
        return parameter.data
    from deepspeed.utils import safe_get_full_fp32_param

    weight = safe_get_full_fp32_param(parameter)
    assert weight is not None, "a parameter that DeepSpeed does not optimize"
    return weight


def full_moment(engine: Any, parameter: nn.Parameter, moment: Moment) -> Tensor:
    """An AdamW moment, fp32, in the shape of its parameter. A collective, see `full_weight`."""
    if not engine.zero_optimization() and not engine.bfloat16_enabled():
        return engine.optimizer.state[parameter][moment]
    from deepspeed.utils import safe_get_full_optimizer_state

    value = safe_get_full_optimizer_state(parameter, moment)
    assert value is not None, "a parameter that DeepSpeed does not optimize"
    return value


def create_state(engine: Any) -> None:
    """Give AdamW its state, zero moments at step 0, before the first step.

    torch creates it lazily, one group after the other, and DeepSpeed's ZeRO-1 and 2 look for it after the first group's step: the
    parameters of every later group would never find theirs.
    """
    wrapped = engine.optimizer
    torch_optimizer = getattr(wrapped, "optimizer", wrapped)
    create_moments(torch_optimizer, _optimized_tensors(wrapped))
    link = getattr(wrapped, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:  # ZeRO-1 and 2, and BF16_Optimizer: let each parameter find its part of the flat states
        link()


def restore(
    engine: Any,
    parameters: Mapping[str, nn.Parameter],
    weights: Mapping[str, Tensor],
    moments: Mapping[Moment, Mapping[str, Tensor]],
    part: Callable[[str, Tensor], Tensor],
    step: int,
) -> None:
    """Put master weights and moments [whole, fp32, by name] and Adam's step count into the optimizer, after `create_state`.

    `part` cuts out of a whole tensor what this process holds of it under tensor parallelism.

    The module must hold `weights` since before `deepspeed.initialize`; what remains is the part of the fp32 master weights that
    rounding to bf16 took away, the moments, and the count.
    """
    wrapped = engine.optimizer
    torch_optimizer = getattr(wrapped, "optimizer", wrapped)
    set_step(torch_optimizer, _optimized_tensors(wrapped), step)
    for name, parameter in parameters.items():
        _set(engine, parameter, part(name, weights[name]), None)
        for moment in MOMENTS:
            _set(engine, parameter, part(name, moments[moment][name]), moment)


def _optimized_tensors(wrapped: Any) -> list[Tensor]:
    """The fp32 tensors that AdamW itself sees: flat partitions under ZeRO and BF16_Optimizer, else the parameters."""
    for flat in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(wrapped, flat):
            return list(getattr(wrapped, flat))
    return [parameter for group in wrapped.param_groups for parameter in group["params"]]


def _set(engine: Any, parameter: nn.Parameter, value: Tensor, moment: Moment | None) -> None:
    value = value.to(parameter.device).contiguous()
    if hasattr(parameter, "ds_id"):
        _set_partition(parameter, value, moment)
    elif hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)
    elif moment is not None:
        engine.optimizer.state[parameter][moment].copy_(value)


def _set_partition(parameter: Any, value: Tensor, moment: Moment | None) -> None:
    """ZeRO-3: this rank's part of `value`, padded at the end. DeepSpeed's setter for whole tensors reads past the end there."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    start = size * parameter._z3_optimizer._get_param_partition_rank(parameter)
    part = value.new_zeros(size)
    inside = value.flatten()[start : start + size]
    part[: inside.numel()] = inside
    if moment is None:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, moment)
