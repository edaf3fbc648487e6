"""Weight decay: which parameters decay, by how much, and the proof that a checkpoint was trained the same way.

λ is what this project studies, so the choice of tensors is explicit (a named scope), complete (each parameter lands in exactly
one group), visible (a table that is printed, hashed and stored in every checkpoint) and compared on resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from megatron_plasticity.config.training import DecayConfig, OptimizerConfig
from megatron_plasticity.errors import CheckpointError, ConfigError
from megatron_plasticity.models.sizes import HEAD, TOKEN_EMBEDDING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class DecayGroups:
    """Names of the parameters that decay and of those that do not, and what λ they see."""

    weight_decay: float
    """λ as the config states it."""
    coupling: str
    decayed: tuple[str, ...]
    not_decayed: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Fingerprint of the table: equal if and only if every parameter is treated alike."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "weight_decay": self.weight_decay,
            "coupling": self.coupling,
            "decayed": sorted(self.decayed),
            "not_decayed": sorted(self.not_decayed),
        }

    def table(self, shapes: Mapping[str, Iterable[int]]) -> str:
        """A readable table of the two groups; layers are folded together."""
        lines = [f"weight decay λ={self.weight_decay:g}, coupling {self.coupling}, groups {self.sha256[:12]}"]
        for title, names in (("decays", self.decayed), ("does not decay", self.not_decayed)):
            size = sum(_numel(shapes[name]) for name in names)
            lines.append(f"  {title}: {len(names)} tensors, {size:,} parameters")
            for name, count in _folded(names).items():
                lines.append(f"    {name}" + (f"  ×{count}" if count > 1 else ""))
        return "\n".join(lines)


def decay_groups(shapes: Mapping[str, tuple[int, ...]], config: OptimizerConfig, weight_decay: float) -> DecayGroups:
    """Sort the parameters to be trained of the whole model, by name with their whole shapes, into decayed and not decayed by
    `config.decay`. The adapters of LoRA are matrices like others, so every scope but `patterns` has all of them decay.

    The layout does not enter: every process of a run gets the same groups, whichever part of the model it holds. Raises
    ConfigError for a pattern without a match and, under scope `patterns`, for parameters that no pattern names.
    """
    decays = _selection(shapes, config.decay)
    return DecayGroups(
        weight_decay=weight_decay,
        coupling=config.decay.coupling,
        decayed=tuple(name for name in shapes if decays[name]),
        not_decayed=tuple(name for name in shapes if not decays[name]),
    )


def optimizer_groups(model: nn.Module, groups: DecayGroups, config: OptimizerConfig) -> list[dict[str, Any]]:
    """`params`, `weight_decay` and `name` for torch AdamW, whose step is θ ← θ − lr·(adam + weight_decay·θ).

    `model` is the whole model or a pipeline stage of it; parameters that are frozen are left out. Coupling `independent` wants
    θ ← θ − (lr/lr_peak)·λ·θ, so the group's decay is λ/lr_peak.
    """
    value = groups.weight_decay / (config.learning_rate if groups.coupling == "independent" else 1.0)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    unassigned = set(parameters) - set(groups.decayed) - set(groups.not_decayed)
    if unassigned or set(groups.decayed) & set(groups.not_decayed):
        raise AssertionError(f"decay groups do not cover the model exactly once: {sorted(unassigned)}")
    made = [
        {"name": name, "weight_decay": decay, "params": [parameters[n] for n in members if n in parameters]}
        for name, decay, members in (("decayed", value, groups.decayed), ("not_decayed", 0.0, groups.not_decayed))
        if members
    ]
    # DeepSpeed sums the gradient norm group by group over all stages, so a stage that holds nothing of a group, such as that of
    # the token embedding, must still have as many groups as the others: it splits the one it has.
    filled = [group for group in made if group["params"]]
    if len(filled) < len(made):
        (only,) = filled
        return [{**only, "params": only["params"][:1]}, {**only, "params": only["params"][1:]}]
    return made


def check_same_groups(stored: Mapping[str, Any], current: DecayGroups, origin: str) -> None:
    """Compare the groups of a checkpoint with those of the config; raises CheckpointError with a diff.

    DeepSpeed would silently take learning rate and λ from the checkpoint, so this comparison is ours.
    """
    now = current.to_json()
    if dict(stored) == now:
        return
    lines = [
        f"  {key}: checkpoint {stored.get(key)!r}, config {now[key]!r}"
        for key in ("weight_decay", "coupling")
        if stored.get(key) != now[key]
    ]
    then = dict.fromkeys(stored.get("decayed", ()), True) | dict.fromkeys(stored.get("not_decayed", ()), False)
    for name in sorted(set(then) | set(current.decayed) | set(current.not_decayed)):
        before, after = _treatment(then.get(name)), _treatment(_lookup(current, name))
        if before != after:
            lines.append(f"  {name}: checkpoint {before}, config {after}")
    raise CheckpointError(
        f"{origin}: trained with other weight-decay groups than the config asks for\n"
        + "\n".join(lines)
        + "\n  A resumed run must keep its λ: correct the config, or start a new run."
    )


def _selection(shapes: Mapping[str, tuple[int, ...]], decay: DecayConfig) -> dict[str, bool]:
    if decay.scope == "all":
        return dict.fromkeys(shapes, True)
    if decay.scope == "no_token_embedding":
        return {name: name != TOKEN_EMBEDDING for name in shapes}
    if decay.scope == "matrices":
        return {name: len(shape) == 2 and name not in (TOKEN_EMBEDDING, HEAD) for name, shape in shapes.items()}
    chosen: dict[str, bool] = {}
    for rule in decay.patterns:
        matches = [name for name in shapes if fnmatchcase(name, rule.pattern)]
        if not matches:
            raise ConfigError(
                f"optimizer.decay.patterns: {rule.pattern!r} matches no parameter; names look like {next(iter(shapes))!r}"
            )
        for name in matches:
            chosen.setdefault(name, rule.decay)
    forgotten = [name for name in shapes if name not in chosen]
    if forgotten:
        raise ConfigError(
            "optimizer.decay.patterns: no pattern names "
            + ", ".join(_folded(forgotten))
            + "; end the list with {pattern: '*', decay: …}"
        )
    return chosen


def _folded(names: Iterable[str]) -> dict[str, int]:
    """Names with layer numbers replaced by `*`, and how many each stands for."""
    counts: dict[str, int] = {}
    for name in names:
        folded = ".".join("*" if part.isdigit() else part for part in name.split("."))
        counts[folded] = counts.get(folded, 0) + 1
    return counts


def _lookup(groups: DecayGroups, name: str) -> bool | None:
    return True if name in groups.decayed else False if name in groups.not_decayed else None


def _treatment(decays: bool | None) -> str:
    return {True: "decays", False: "does not decay", None: "absent"}[decays]


def _numel(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
