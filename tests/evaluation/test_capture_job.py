"""Activations of a finished model: on which sequences, and that they are those of the run itself and of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_plasticity.capture.store import ActivationStore
from megatron_plasticity.config.analysis import ModelCaptureConfig, model_capture_config
from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.capture_job import capture
from megatron_plasticity.interchange.exporting import export_model
from megatron_plasticity.interchange.importing import import_model
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.finetune import finetune
from megatron_plasticity.training.pretrain import pretrain
from tests.commands import Run
from tests.interchange.folders import write_model

MakePretrain = Callable[..., PretrainConfig]
MakeFinetune = Callable[..., FinetuneConfig]


def config_of(run: Path, **settings: Any) -> ModelCaptureConfig:
    tree = {"name": "test", "run": run, "output": run.parent, "device": "cpu", **settings}
    return ModelCaptureConfig.model_validate(tree)


def store_of(folder: RunFolder) -> ActivationStore:
    return ActivationStore(folder.path / "activations")


@pytest.fixture
def base(pretrain_config: MakePretrain) -> RunFolder:
    changes = {
        "capture": {"steps": [5], "sequences": 4, "positions": "all", "points": ["*", "logits"]},
        "steps": 6,
        "model": {"context_length": 128},
    }
    return pretrain(pretrain_config(changes), NoProgress())


def test_what_is_recorded_of_a_checkpoint_is_what_the_run_recorded_at_that_step(base: RunFolder) -> None:
    settings = {"sequences": 4, "positions": "all", "points": ["*", "logits"], "batch_size": 3}
    during = store_of(base)
    for step, run in ((6, base.path), (5, base.path / "checkpoints" / "step-5")):
        folder = capture(config_of(run, **settings), NoProgress())
        after = store_of(folder)
        assert folder.results["step"] == step
        assert after.points(step) == during.points(step)
        assert after.sequences.sha256 == during.sequences.sha256 == folder.results["sequences_sha256"]
        for point in after.points(step):
            torch.testing.assert_close(after.read(step, point), during.read(step, point), rtol=1e-5, atol=1e-6, msg=point)
    ActivationStore(folder.path / "activations", {"run": base.hash})
    with pytest.raises(UserError, match=r"activations of another model \(run"):
        ActivationStore(folder.path / "activations", {"run": "other"})


def test_states_are_those_of_transformers_own_model(base: RunFolder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = export_model(base.path, tmp_path / "exported", NoProgress(), parity=False)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    store = store_of(
        capture(config_of(base.path, sequences=4, positions="all", points=["embed", "*resid*", "logits"]), NoProgress())
    )
    with torch.no_grad():
        output = theirs(store.sequences.tokens, output_hidden_states=True)
    torch.testing.assert_close(store.read(6, "embed"), output.hidden_states[0])
    torch.testing.assert_close(store.read(6, "layers.0.resid_post"), output.hidden_states[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(store.read(6, "layers.1.resid_pre"), output.hidden_states[1], rtol=1e-5, atol=1e-5)
    values, ids = output.logits.topk(10)
    torch.testing.assert_close(store.read(6, "logits.values"), values, rtol=1e-5, atol=1e-5)
    assert (store.read(6, "logits.ids") == ids).float().mean() > 0.99


def recorded_and_exported(base: RunFolder, folder: Path) -> tuple[ActivationStore, Path]:
    settings = {"sequences": 2, "positions": "all", "points": ["embed", "*resid*", "*.out", "head"]}
    export = export_model(base.path, folder / "exported", NoProgress(), parity=False)
    return store_of(capture(config_of(base.path, **settings), NoProgress())), export


def test_states_are_those_of_transformer_lens(base: RunFolder, tmp_path: Path) -> None:
    bridges = pytest.importorskip("transformer_lens.model_bridge", reason="TransformerLens 3 is not installed")
    store, export = recorded_and_exported(base, tmp_path)
    bridge = bridges.TransformerBridge.boot_transformers(str(export), device="cpu")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(store.sequences.tokens)
    names = {"embed": "embed.hook_out", "head": "unembed.hook_out"}
    for layer in range(2):
        ours, theirs = f"layers.{layer}", f"blocks.{layer}"
        names |= {f"{ours}.resid_pre": f"{theirs}.hook_in", f"{ours}.resid_post": f"{theirs}.hook_out"}
        names |= {f"{ours}.{part}.out": f"{theirs}.{part}.hook_out" for part in ("attn", "mlp")}
    for ours, theirs in names.items():
        torch.testing.assert_close(store.read(6, ours), cache[theirs], rtol=1e-4, atol=1e-4, msg=ours)


def test_states_are_those_of_nnsight(base: RunFolder, tmp_path: Path) -> None:
    nnsight = pytest.importorskip("nnsight")
    from transformers import AutoModelForCausalLM

    store, export = recorded_and_exported(base, tmp_path)
    model = nnsight.NNsight(AutoModelForCausalLM.from_pretrained(export))
    with torch.no_grad(), model.trace(store.sequences.tokens):
        first = model.model.layers[0].mlp.output.save()
        last = model.lm_head.output.save()
    for ours, theirs in (("layers.0.mlp.out", first), ("head", last)):
        found = getattr(theirs, "value", theirs)  # a proxy in older versions
        torch.testing.assert_close(store.read(6, ours), found, rtol=1e-5, atol=1e-5, msg=ours)


def test_done_is_done_and_other_settings_are_another_run(base: RunFolder) -> None:
    first = capture(config_of(base.path), NoProgress())
    assert capture(config_of(base.path, batch_size=1, memory_mib=8), NoProgress()).path == first.path
    assert capture(config_of(base.path, precision="bf16"), NoProgress()).path != first.path


def test_sequences_are_drawn_by_seed_and_cut(base: RunFolder) -> None:
    def tokens(**settings: Any) -> torch.Tensor:
        return store_of(capture(config_of(base.path, sequences=3, **settings), NoProgress())).sequences.tokens

    assert tokens(max_tokens=7).shape == (3, 7)
    assert torch.equal(tokens(max_tokens=7), tokens()[:, :7])
    assert not torch.equal(tokens(sample_seed=1), tokens(sample_seed=2))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_texts_of_ones_own_each_to_its_own_end(base: RunFolder, tmp_path: Path, suffix: str) -> None:
    texts = ["A short one.", "This one is a little longer.", "Third"]
    path = tmp_path / f"texts{suffix}"
    lines = texts if suffix == ".txt" else [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join([*lines[:2], "", lines[2]]) + "\n")
    folder = capture(config_of(base.path, texts=path, points=["layers.1.resid_post"]), NoProgress())
    store, tokenizer = store_of(folder), Tokenizer.load(base.path / "tokenizer.json")
    assert [tokenizer.decode(row[:length].tolist()) for row, length in zip(*_rows(store), strict=True)] == texts
    alone = tmp_path / "alone.txt"
    alone.write_text(texts[0] + "\n")
    short = store_of(capture(config_of(base.path, texts=alone, points=["layers.1.resid_post"]), NoProgress()))
    torch.testing.assert_close(store.read(6, "layers.1.resid_post")[:1], short.read(6, "layers.1.resid_post"))
    path.write_text("other\n" if suffix == ".txt" else '{"text": "other"}\n')
    assert capture(config_of(base.path, texts=path, points=["layers.1.resid_post"]), NoProgress()).path != folder.path


def _rows(store: ActivationStore) -> tuple[torch.Tensor, list[int]]:
    return store.sequences.tokens, store.sequences.lengths.tolist()


def test_positions_of_the_answer_are_those_of_the_response(base: RunFolder) -> None:
    task = {"name": "arithmetic", "questions": "train", "train_examples": 8}
    folder = capture(config_of(base.path, task=task, positions="answer", sequences=8, points=["embed"]), NoProgress())
    sequences, tokenizer = store_of(folder).sequences, Tokenizer.load(base.path / "tokenizer.json")
    assert 0 < len(sequences) <= 8
    for tokens, length, positions in zip(sequences.tokens, sequences.lengths, sequences.positions, strict=True):
        first, *_ = places = positions[positions >= 0].tolist()
        assert places == list(range(first, int(length)))
        assert tokenizer.decode(tokens[:first].tolist()).endswith("Assistant:")


def test_a_fine_tuned_model_is_asked_its_own_task(base: RunFolder, finetune_config: MakeFinetune) -> None:
    tuned = finetune(finetune_config(base.path, {"max_length": 128}), NoProgress())
    folder = capture(config_of(tuned.path, sequences=4, points=["embed"]), NoProgress())
    text = Tokenizer.load(tuned.path / "tokenizer.json").decode(store_of(folder).sequences.tokens[0].tolist())
    assert text.startswith("Human:")


def test_a_model_from_elsewhere_needs_sequences_and_has_them_from_texts(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs")
    folder = import_model(ImportConfig(name="model", source=str(tmp_path / "theirs"), output=tmp_path), NoProgress())
    with pytest.raises(UserError, match=r"pretrained elsewhere.*state `texts` or `task`"):
        capture(config_of(folder.path), NoProgress())
    texts = tmp_path / "texts.txt"
    texts.write_text("\n \n")
    with pytest.raises(UserError, match="holds no text"):
        capture(config_of(folder.path, texts=texts), NoProgress())
    texts.write_text("a text\n")
    store = store_of(capture(config_of(folder.path, texts=texts, points=["embed"]), NoProgress()))
    assert store.identity["weight_decay"] is None
    assert store.steps == [0]


def test_answers_that_are_cut_off_are_passed_over(base: RunFolder) -> None:
    settings = {"task": {"name": "arithmetic", "questions": "train"}, "positions": "answer", "points": ["embed"]}
    with pytest.raises(UserError, match="none has an answer within its first 5 tokens; raise max_tokens"):
        capture(config_of(base.path, max_tokens=5, **settings), NoProgress())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": ["layers.*.resid_pots"]}, "no hook point matches 'layers.*.resid_pots'; nearest: "),
        ({"texts": "nowhere.txt"}, "nowhere.txt: there is no such file"),
        ({"task": {"name": "arithmetics"}}, "did you mean 'arithmetic'"),
        ({"positions": "answer"}, "a corpus has none; state `task`"),
        ({"keep": "statistics", "points": ["*"], "memory_mib": 1}, None),
    ],
)
def test_bad_input_ends_in_a_message(base: RunFolder, settings: dict[str, Any], message: str | None) -> None:
    if message is None:  # a megabyte is enough for this model
        assert capture(config_of(base.path, **settings), NoProgress()).results["statistics"]
        return
    with pytest.raises(UserError) as caught:
        capture(config_of(base.path, **settings), NoProgress())
    assert message in str(caught.value)


def test_the_command_takes_a_run_and_a_step(base: RunFolder, run: Run) -> None:
    output = f"output={base.path.parent}"
    code, out, err = run("capture", base.path, output, "sequences=2", "keep=both", "device=cpu", "--step", 5)
    assert code == 0, err
    assert "step 5: 2 positions of 2 sequences" in out
    assert "layers.1.resid_post    2 × 32" in out
    assert "layers.1.resid_post    statistics" in out
    assert store_of(RunFolder.open(Path(out.splitlines()[-1]))).steps == [5]
    code, _, err = run("capture", base.path, "--step", 7)
    assert (code, "no checkpoint of step 7; there are 5, 6" in err) == (2, True)
    code, out, _ = run("capture", base.path, "--dry-run")
    assert code == 0
    assert "points:" in out
    assert model_capture_config(base.path).name == base.path.name
