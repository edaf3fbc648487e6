"""Shape of the model. What a family means beyond its shape is data in `models/families.py`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_plasticity.config.base import Section

Family = Literal["llama2", "olmo2"]

# Where the two families differ in a number rather than in structure (Llama-2: 2307.09288; OLMo-2: 2501.00656).
_FAMILY_DEFAULTS: dict[str, dict[str, float]] = {
    "llama2": {"norm_eps": 1e-5, "rope_theta": 10_000.0, "z_loss_weight": 0.0},
    "olmo2": {"norm_eps": 1e-6, "rope_theta": 500_000.0, "z_loss_weight": 1e-5},
}


class ModelConfig(Section):
    family: Family
    """Architecture family: `llama2` (pre-norm) or `olmo2` (norm on each sub-layer's output, RMS QK-norm)."""
    layers: PositiveInt
    """Number of transformer blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream, d."""
    mlp_hidden_size: PositiveInt
    """Width of the SwiGLU hidden layer."""
    query_heads: PositiveInt
    """Number of query heads."""
    kv_heads: PositiveInt
    """Number of key/value heads (groups of grouped-query attention); must divide `query_heads`."""
    head_dim: PositiveInt
    """Width of one head; `query_heads * head_dim` must equal `hidden_size`, and rotary embedding needs it even."""
    vocab_size: PositiveInt
    """Rows of the embedding and of the head; at least as many as the tokenizer has ids."""
    context_length: PositiveInt
    """Longest sequence in tokens that the model is trained on."""
    tied_embeddings: bool = False
    """Share the token embedding with the output head."""
    norm_eps: PositiveFloat
    """ε of RMSNorm. Default by family: 1e-5 for llama2, 1e-6 for olmo2."""
    rope_theta: PositiveFloat
    """Base of the rotary embedding. Default by family: 10,000 for llama2, 500,000 for olmo2."""
    z_loss_weight: float = Field(ge=0)
    """Weight of the z-loss, mean(logsumexp²), in the training loss. Default by family: 0 for llama2, 1e-5 for olmo2."""

    @model_validator(mode="before")
    @classmethod
    def _fill_family_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {**_FAMILY_DEFAULTS.get(values.get("family", ""), {}), **values}
        return values

    @model_validator(mode="after")
    def _check_shape(self) -> ModelConfig:
        problems = []
        if self.query_heads % self.kv_heads:
            problems.append(f"kv_heads={self.kv_heads} must divide query_heads={self.query_heads}")
        if self.query_heads * self.head_dim != self.hidden_size:
            problems.append(
                f"query_heads * head_dim = {self.query_heads} * {self.head_dim} = {self.query_heads * self.head_dim} "
                f"must equal hidden_size={self.hidden_size}"
            )
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim} must be even for rotary embedding")
        if problems:
            raise ValueError("; ".join(problems))
        return self
