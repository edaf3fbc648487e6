from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_plasticity.capture.points import hook_points, sequence_axis
from megatron_plasticity.capture.recorder import Positions, Recorder
from megatron_plasticity.models.attention import attend
from megatron_plasticity.models.transformer import Transformer


def test_outputs_and_gradients_are_bit_equal_with_every_point_recorded(model: Transformer, tokens: Tensor) -> None:
    plain = model(tokens)
    plain.square().sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()

    with Recorder(model, ["*"]) as recorder:
        watched = model(tokens)
        watched.square().sum().backward()

    assert torch.equal(watched, plain)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        assert torch.equal(weight.grad, gradients[name]), name
    assert not any(tensor.requires_grad for tensor in recorder.captured.values())


def test_recorded_tensors_belong_together_as_the_architecture_says(model: Transformer, tokens: Tensor) -> None:
    record = Recorder(model, ["*"]).record(tokens)
    assert list(record) == hook_points(model.config)
    assert torch.equal(record["embed"], model.embed.weight[tokens])
    assert torch.equal(record["layers.0.resid_post"], record["layers.1.resid_pre"])
    block = model.layers[1]
    mixed = attend(record["layers.1.attn.q"], record["layers.1.attn.k"], record["layers.1.attn.v"], None, "sdpa")
    assert record["layers.1.attn.q"].shape == (3, 4, 10, 8)
    assert record["layers.1.attn.k"].shape == (3, 2, 10, 8)
    torch.testing.assert_close(record["layers.1.attn.z"], mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(record["layers.1.attn.out"], record["layers.1.attn.z"] @ block.attn.out_proj.weight.T)  # type: ignore[union-attr]
    torch.testing.assert_close(record["layers.1.mlp.gate"], torch.nn.functional.silu(record["layers.1.mlp.pre"]))
    torch.testing.assert_close(record["layers.1.mlp.out"], record["layers.1.mlp.post"] @ block.mlp.down_proj.weight.T)  # type: ignore[union-attr]
    torch.testing.assert_close(record["head"], model(tokens))


def test_no_hook_outlives_recording_even_when_the_forward_pass_fails(model: Transformer, tokens: Tensor) -> None:
    recorder = Recorder(model, ["embed", "layers.*.resid_post"])
    recorder.record(tokens)
    with pytest.raises(IndexError):
        recorder.record(tokens + 1000)
    assert all(not module._forward_hooks for module in model.modules())


def test_training_mode_is_left_as_it_was(model: Transformer, tokens: Tensor) -> None:
    for mode in (True, False):
        model.train(mode)
        Recorder(model, ["embed"]).record(tokens)
        assert model.training is mode


def test_last_positions_of_texts_of_different_length_are_those_of_each_text_alone(model: Transformer, tokens: Tensor) -> None:
    lengths = torch.tensor([10, 1, 6])
    record = Recorder(model, ["*"], positions="last").record(tokens, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = Recorder(model, ["*"]).record(tokens[row : row + 1, :length])
        for name, recorded in record.items():
            expected = alone[name].select(sequence_axis(name), -1)[0]
            torch.testing.assert_close(recorded[row], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_last_position_without_lengths_is_the_last_column(model: Transformer, tokens: Tensor) -> None:
    whole, last = Recorder(model, ["*"]).record(tokens), Recorder(model, ["*"], positions="last").record(tokens)
    for name in whole:
        torch.testing.assert_close(last[name], whole[name].select(sequence_axis(name), -1), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("lengths", [[0, 3, 3], [3, 3, 11]])
def test_lengths_outside_the_tokens_are_refused(model: Transformer, tokens: Tensor, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="between 1 and 10"):
        Recorder(model, ["embed"], positions="last").record(tokens, torch.tensor(lengths))


def test_copies_have_the_wanted_number_format_and_memory_of_their_own(model: Transformer, tokens: Tensor) -> None:
    assert Recorder(model, ["embed"], dtype=torch.bfloat16).record(tokens)["embed"].dtype == torch.bfloat16
    with Recorder(model, ["final_norm"]) as recorder:
        model.final_norm.register_forward_hook(lambda _module, _inputs, output: output.zero_())
        model(tokens)
    assert recorder.captured["final_norm"].abs().sum() > 0


def test_a_recorder_is_attached_once(model: Transformer) -> None:
    with Recorder(model, ["embed"]) as recorder, pytest.raises(RuntimeError, match="attached already"), recorder:
        pass
    assert not model.embed._forward_hooks


@pytest.mark.parametrize("positions", ["all", "last"])
def test_kept_positions_are_those_of_the_whole_recording(model: Transformer, tokens: Tensor, positions: Positions) -> None:
    kept = torch.tensor([[2, 7], [0, -1], [9, -1]])[:, : 1 if positions == "last" else 2]
    whole, chosen = Recorder(model, ["*"]).record(tokens), Recorder(model, ["*"], positions).record(tokens, kept=kept)
    for name, recorded in chosen.items():
        axis = sequence_axis(name)
        for row, places in enumerate(kept.tolist()):
            for column, place in enumerate(places):
                found = recorded[row] if positions == "last" else recorded[row].select(axis - 1, column)
                expected = whole[name][row].select(axis - 1, place) if place >= 0 else torch.zeros_like(found)
                assert torch.equal(found, expected), (name, row, place)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_logits_are_the_largest_of_the_head_with_their_ids(model: Transformer, tokens: Tensor, positions: Positions) -> None:
    record = Recorder(model, ["head", "logits"], positions, top_k=4).record(tokens)
    assert list(record) == ["head", "logits.values", "logits.ids"]
    assert record["logits.ids"].dtype == torch.int64
    assert torch.equal(record["head"].gather(-1, record["logits.ids"]), record["logits.values"])
    assert torch.equal(record["logits.values"], record["head"].sort(dim=-1, descending=True).values[..., :4])


def test_logits_are_all_there_are_of_a_small_vocabulary(model: Transformer, tokens: Tensor) -> None:
    record = Recorder(model, ["logits"], dtype=torch.bfloat16, top_k=1000).record(tokens)
    assert record["logits.ids"].shape == (3, 10, 50)
    assert record["logits.values"].dtype == torch.bfloat16
