"""Which tensors decay: by selection, for each scope and family, and by comparison with a checkpoint."""

from __future__ import annotations

import pytest

from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.training import DecayConfig, DecayPattern, OptimizerConfig
from megatron_plasticity.errors import CheckpointError, ConfigError
from megatron_plasticity.models.sizes import parameter_shapes
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.optim.decay import DecayGroups, check_same_groups, decay_groups, optimizer_groups

SHAPE = {
    "layers": 2,
    "hidden_size": 16,
    "mlp_hidden_size": 24,
    "query_heads": 4,
    "kv_heads": 2,
    "head_dim": 4,
    "vocab_size": 32,
    "context_length": 8,
}
MATRICES = [
    f"layers.{layer}.{part}.weight"
    for layer in (0, 1)
    for part in (
        "attn.q_proj",
        "attn.k_proj",
        "attn.v_proj",
        "attn.out_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]


def model(family: str = "llama2", tied: bool = False) -> Transformer:
    return Transformer(ModelConfig.model_validate({**SHAPE, "family": family, "tied_embeddings": tied}))


def optimizer(decay: DecayConfig | None = None, **values: float) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"learning_rate": 0.01, "weight_decay": 0.1, "decay": decay or DecayConfig(), **values})


def groups(transformer: Transformer, **decay: object) -> DecayGroups:
    return decay_groups(parameter_shapes(transformer.config), optimizer(DecayConfig.model_validate(decay)), 0.1)


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
def test_scope_all_decays_everything(family: str) -> None:
    chosen = groups(model(family), scope="all")
    assert set(chosen.decayed) == {name for name, _ in model(family).named_parameters()}
    assert chosen.not_decayed == ()


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
def test_scope_no_token_embedding_spares_that_and_nothing_else(family: str) -> None:
    chosen = groups(model(family), scope="no_token_embedding")
    assert chosen.not_decayed == ("embed.weight",)
    assert "head.weight" in chosen.decayed
    assert "final_norm.weight" in chosen.decayed


@pytest.mark.parametrize("family", ["llama2", "olmo2"])
def test_scope_matrices_spares_embeddings_and_gains(family: str) -> None:
    assert sorted(groups(model(family), scope="matrices").decayed) == sorted(MATRICES)


def test_a_tied_embedding_is_one_parameter() -> None:
    chosen = groups(model(tied=True), scope="all")
    assert chosen.decayed.count("embed.weight") == 1
    assert "head.weight" not in chosen.decayed


def test_patterns_are_tried_in_order() -> None:
    chosen = groups(
        model(),
        scope="patterns",
        patterns=[
            {"pattern": "layers.0.*", "decay": False},
            {"pattern": "layers.*", "decay": True},
            {"pattern": "*", "decay": False},
        ],
    )
    assert {name.split(".")[1] for name in chosen.decayed} == {"1"}


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'layer\.\*' matches no parameter"):
        groups(model(), scope="patterns", patterns=[{"pattern": "layer.*", "decay": True}, {"pattern": "*", "decay": False}])


def test_a_parameter_that_no_pattern_names_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no pattern names embed\.weight, final_norm\.weight, head\.weight"):
        groups(model(), scope="patterns", patterns=[{"pattern": "layers.*", "decay": True}])


def test_patterns_without_their_scope_are_refused() -> None:
    with pytest.raises(ValueError, match='scope "patterns"'):
        DecayConfig(scope="all", patterns=(DecayPattern(pattern="*", decay=True),))


def test_every_parameter_is_in_one_optimizer_group() -> None:
    transformer = model("olmo2")
    settings = optimizer(DecayConfig(scope="no_token_embedding"))
    made = optimizer_groups(transformer, decay_groups(parameter_shapes(transformer.config), settings, 0.1), settings)
    ids = [id(parameter) for group in made for parameter in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(transformer.parameters()))
    assert [group["weight_decay"] for group in made] == [0.1, 0.0]


def test_independent_coupling_divides_by_the_peak() -> None:
    transformer = model()
    settings = optimizer(DecayConfig(coupling="independent"))
    made = optimizer_groups(transformer, decay_groups(parameter_shapes(transformer.config), settings, 0.1), settings)
    assert made[0]["weight_decay"] == pytest.approx(0.1 / 0.01)  # AdamW multiplies by lr: at the peak θ shrinks by λ itself


def test_the_table_folds_layers_and_counts_parameters() -> None:
    transformer = model()
    table = groups(transformer, scope="no_token_embedding").table({n: p.shape for n, p in transformer.named_parameters()})
    assert "layers.*.mlp.up_proj.weight  ×2" in table
    assert "does not decay: 1 tensors, 512 parameters" in table


def test_the_fingerprint_tells_any_difference() -> None:
    base = groups(model(), scope="all")
    assert base.sha256 == groups(model(), scope="all").sha256
    assert base.sha256 != groups(model(), scope="matrices").sha256
    assert base.sha256 != decay_groups(parameter_shapes(model().config), optimizer(), 0.2).sha256


def test_equal_groups_pass_and_others_are_told_apart() -> None:
    now = groups(model(), scope="matrices")
    check_same_groups(now.to_json(), now, "here")
    stored = {**groups(model(), scope="all").to_json(), "weight_decay": 0.5}
    with pytest.raises(CheckpointError) as error:
        check_same_groups(stored, now, "step-5")
    text = str(error.value)
    assert "weight_decay: checkpoint 0.5, config 0.1" in text
    assert "embed.weight: checkpoint decays, config does not decay" in text
    assert "q_proj" not in text, "what agrees is not listed"


def test_stating_weight_decay_twice_or_never_is_refused() -> None:
    for values in ({"weight_decay": 0.1, "adamw_timescale": 1.0}, {"weight_decay": None}):
        with pytest.raises(ValueError, match="exactly one of"):
            optimizer(**values)  # pyright: ignore[reportArgumentType]
