from __future__ import annotations

import pytest
from torch import Tensor

from megatron_plasticity.capture.points import hook_points, layer_of, match_points, sequence_axis, state_shape
from megatron_plasticity.capture.recorder import Recorder
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer

IN_LAYER = ["resid_pre", "attn.q", "attn.k", "attn.v", "attn.z", "attn.out", "resid_mid"]
IN_LAYER += ["mlp.pre", "mlp.gate", "mlp.post", "mlp.out", "resid_post"]


def test_every_canonical_point_is_found_in_the_order_of_the_forward_pass(model: Transformer) -> None:
    layers = [f"layers.{layer}.{name}" for layer in range(2) for name in IN_LAYER]
    assert hook_points(model.config) == ["embed", *layers, "final_norm", "head"]


def test_every_point_is_a_module_of_that_path(model: Transformer) -> None:
    assert {*hook_points(model.config)} <= {name for name, _ in model.named_modules()}


def test_listed_order_is_the_order_in_which_hooks_fire(model: Transformer, tokens) -> None:
    fired: list[str] = []
    for name in hook_points(model.config):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    model(tokens)
    # Inside attention and MLP the projections of one input have no order among themselves.
    order = hook_points(model.config)
    strict = [name for name in order if name.endswith(("resid_pre", "attn.z", "attn.out", "resid_mid", "mlp.out", "resid_post"))]
    assert sorted(fired) == sorted(order)
    assert [name for name in fired if name in strict] == strict


def test_globs_choose_points_once_and_in_forward_order(model: Transformer) -> None:
    assert match_points(model.config, ["layers.*.resid_post", "embed", "layers.1.*post"]) == [
        "embed", "layers.0.resid_post", "layers.1.mlp.post", "layers.1.resid_post",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("glob", "advice"),
    [("layers.0.resid_pots", "layers.0.resid_post"), ("layers.7.attn.q", "layers.1.attn.q"), ("zzz*", "layers 0 to 1")],
)
def test_a_glob_without_a_match_names_what_there_is(model: Transformer, glob: str, advice: str) -> None:
    with pytest.raises(UserError, match=f"no hook point matches '{glob.replace('*', '.')}'") as caught:
        match_points(model.config, ["embed", glob])
    assert advice in str(caught.value)


def test_layer_and_axis_of_a_point() -> None:
    assert [layer_of(name) for name in ("embed", "layers.12.attn.q", "head")] == [None, 12, None]
    assert [sequence_axis(name) for name in ("layers.0.attn.q", "layers.0.attn.z", "embed")] == [2, 1, 1]


def test_logits_are_taken_by_name_alone(model: Transformer) -> None:
    assert match_points(model.config, ["logits", "embed"]) == ["embed", "logits"]
    assert "logits" not in match_points(model.config, ["*"])
    with pytest.raises(UserError, match="nearest: logits"):
        match_points(model.config, ["logit"])


def test_shape_of_a_state_is_that_of_what_is_recorded(model: Transformer, tokens: Tensor) -> None:
    for point, recorded in Recorder(model, ["*"], positions="last").record(tokens).items():
        assert tuple(recorded.shape[1:]) == state_shape(point, model.config), point
