"""What sets the two families apart in structure. Numbers that differ (ε, RoPE base, z-loss) are defaults of `ModelConfig`.

Llama-2: Touvron et al., 2307.09288. OLMo-2: Team OLMo, 2501.00656, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_plasticity.config.model import Family


@dataclass(frozen=True)
class FamilyTraits:
    norm_placement: Literal["input", "output"]
    """RMSNorm on what enters a sub-layer, x + f(norm(x)), or on what leaves it, x + norm(f(x))."""
    qk_norm: bool
    """RMSNorm over the whole query and the whole key projection (all heads at once), before RoPE."""
    initialisation: Literal["scaled_normal", "truncated_normal"]
    """How the initial weights are drawn; see `models/initialisation.py`."""


FAMILIES: dict[Family, FamilyTraits] = {
    "llama2": FamilyTraits(norm_placement="input", qk_norm=False, initialisation="scaled_normal"),
    "olmo2": FamilyTraits(norm_placement="output", qk_norm=True, initialisation="truncated_normal"),
}
