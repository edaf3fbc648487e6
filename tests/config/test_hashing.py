from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from megatron_plasticity.config import hashing
from megatron_plasticity.config.base import Section, added_later, neutral
from megatron_plasticity.config.hashing import HASH_DIGITS, KINDS, RESULTS_VERSION, canonical, config_hash, kind_of
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.config.training import OptimizerConfig, PretrainConfig


class Inner(Section):
    width: int = 1
    label: str = neutral("a")


class Outer(Section):
    rate: float = 0.1
    output: Path = neutral(Path("runs"))
    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()
    named: dict[str, Inner] = Field(default={})
    free: dict[str, Any] = Field(default={})


def test_hash_is_ten_hex_digits_and_stable() -> None:
    # Written down, so that a change of the recipe, which would orphan every finished run, cannot pass unnoticed.
    assert config_hash(Inner()) == "9e757a0563"
    assert len(config_hash(Outer())) == HASH_DIGITS


@pytest.mark.parametrize(
    "same",
    [
        {"output": "elsewhere"},
        {"inner": {"label": "b"}},
        {"rate": "1e-1"},  # as PyYAML reads it
    ],
)
def test_neutral_fields_and_spelling_do_not_count(same: dict[str, Any]) -> None:
    assert config_hash(Outer.model_validate(same)) == config_hash(Outer())


def test_neutral_fields_do_not_count_inside_tuples_and_dicts() -> None:
    one = Outer(several=(Inner(label="x"),), named={"k": Inner(label="x")})
    other = Outer(several=(Inner(label="y"),), named={"k": Inner(label="y")})
    assert config_hash(one) == config_hash(other)


@pytest.mark.parametrize(
    "other",
    [
        {"rate": 0.2},
        {"rate": math.inf},
        {"inner": {"width": 2}},
        {"several": [{}]},
        {"named": {"k": {}}},
        {"free": {"a": [1, {"b": None}]}},
    ],
)
def test_everything_else_counts(other: dict[str, Any]) -> None:
    assert config_hash(Outer.model_validate(other)) != config_hash(Outer())


def test_a_field_that_was_added_later_counts_only_where_it_is_set() -> None:
    class Grown(Inner):
        height: int = added_later(3)

    assert canonical(Grown()) == canonical(Inner())
    assert canonical(Grown(height=4)) == {**canonical(Inner()), "height": 4}


def test_order_of_keys_does_not_count() -> None:
    assert config_hash(Outer(free={"a": 1, "b": 2})) == config_hash(Outer(free={"b": 2, "a": 1}))


def test_infinity_is_not_the_word_infinity() -> None:
    assert config_hash(Outer(free={"a": math.inf})) != config_hash(Outer(free={"a": "inf"}))
    assert canonical(OptimizerConfig.model_validate({"learning_rate": 1, "adamw_timescale": math.inf}))["adamw_timescale"] == {
        "float": "inf"
    }


def test_inputs_count_by_name_and_value() -> None:
    hashes = {
        config_hash(Outer()),
        config_hash(Outer(), corpus="1"),
        config_hash(Outer(), corpus="2"),
        config_hash(Outer(), base="1"),
    }
    assert len(hashes) == 4
    assert config_hash(Outer(), section="1") != config_hash(Outer())  # no name is taken


def test_a_raised_results_version_renames_every_run_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, pretrain_config: PretrainConfig
) -> None:
    before, others = config_hash(pretrain_config), config_hash(Outer())
    monkeypatch.setitem(hashing.RESULTS_VERSION, "pretrain", RESULTS_VERSION["pretrain"] + 1)
    assert config_hash(pretrain_config) != before
    assert config_hash(Outer()) == others


def test_every_kind_has_a_version() -> None:
    assert set(RESULTS_VERSION) == set(KINDS)


def test_equal_fields_of_another_kind_hash_differently() -> None:
    class Twin(Section):
        width: int = 1
        label: str = neutral("a")

    assert canonical(Twin()) == canonical(Inner())
    assert config_hash(Twin()) != config_hash(Inner())
    assert kind_of(TaskConfig(name="arithmetic")) == "TaskConfig"


def test_place_name_and_logging_of_a_real_run_do_not_count(pretrain_config: PretrainConfig) -> None:
    moved = pretrain_config.model_copy(
        update={
            "name": "other",
            "output": Path("/elsewhere"),
            "data": pretrain_config.data.model_copy(update={"folder": Path("/moved")}),
            "logging": pretrain_config.logging.model_copy(update={"every_steps": 99}),
        }
    )
    assert config_hash(moved) == config_hash(pretrain_config)
    other_seed = pretrain_config.model_copy(update={"seed": 43})
    assert config_hash(other_seed) != config_hash(pretrain_config)


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="a config cannot hold a object"):
        config_hash(Outer(free={"a": object()}))


@pytest.fixture
def pretrain_config() -> PretrainConfig:
    model = {
        "family": "llama2",
        "layers": 1,
        "hidden_size": 16,
        "mlp_hidden_size": 32,
        "query_heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "vocab_size": 300,
        "context_length": 16,
    }
    return PretrainConfig.model_validate(
        {
            "name": "tiny",
            "model": model,
            "data": {"folder": "data/tiny"},
            "steps": 3,
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
            "batch": {"global_batch_size": 2, "micro_batch_size": 1},
        }
    )
