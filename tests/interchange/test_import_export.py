"""From a Hugging Face folder to a run folder and back: bit by bit the same, usable on both sides, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.interchange import exporting, importing
from megatron_plasticity.interchange.exporting import export_model
from megatron_plasticity.interchange.importing import import_model
from megatron_plasticity.interchange.parity import check_parity, compare
from megatron_plasticity.interchange.sources import find_source
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel
from tests.interchange.folders import as_pickle, change_config, copy, stored_tensors, write_model, write_tokenizer

FAMILIES = pytest.mark.parametrize("model_type", ["llama", "olmo2"])
TIED = pytest.mark.parametrize("tied", [False, True])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tests copy before they change it."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    write_model(folder)
    return folder


def imported(source: Path, output: Path, **settings: Any) -> RunFolder:
    return import_model(ImportConfig(name="model", source=str(source), output=output, **settings), NoProgress())


def exported(run: RunFolder, output: Path, **settings: Any) -> Path:
    return export_model(run.path, output, NoProgress(), **settings)


# --- both ways ---


@FAMILIES
@TIED
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_import_then_export_is_bit_identical(tmp_path: Path, model_type: str, tied: bool, kv_heads: int) -> None:
    source = tmp_path / "source"
    write_model(source, model_type, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    run = imported(source, tmp_path / "runs")
    folder = exported(run, tmp_path / "export")
    before, after = stored_tensors(source), stored_tensors(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert run.results["parity"]["passed"]
    assert json.loads((folder / "parity.json").read_text())["relative_difference"] < 1e-4


@FAMILIES
@TIED
def test_export_then_import_is_bit_identical(tmp_path: Path, model_type: str, tied: bool) -> None:
    write_model(tmp_path / "source", model_type, tie_word_embeddings=tied)
    first = TrainedModel.open(imported(tmp_path / "source", tmp_path / "runs").path).checkpoint
    folder = export_model(first.path, tmp_path / "export", NoProgress())
    second = TrainedModel.open(imported(folder, tmp_path / "again").path).checkpoint
    assert first.model == second.model
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())


def test_bf16_weights_survive_both_ways(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "olmo2", dtype=torch.bfloat16)
    run = imported(tmp_path / "source", tmp_path / "runs")
    assert run.results["stored_as"] == {"bfloat16": 25}
    folder = exported(run, tmp_path / "export", dtype="bfloat16")
    before, after = stored_tensors(tmp_path / "source"), stored_tensors(folder)
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)


def test_shards_and_pickles_import_like_a_single_file(tmp_path: Path, llama: Path) -> None:
    write_model(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    as_pickle(copy(llama, tmp_path / "pickled"))
    whole, *others = (
        TrainedModel.open(imported(source, tmp_path / "runs").path).checkpoint.tensors()
        for source in (llama, tmp_path / "sharded", tmp_path / "pickled")
    )
    assert all(torch.equal(tensor, other[name]) for other in others for name, tensor in whole.items())


@pytest.mark.parametrize("pickled", [False, True])
def test_what_older_files_repeat_is_passed_over(tmp_path: Path, pickled: bool) -> None:
    """A tied head that is stored once more, and the tables of RoPE that Llama's first files had."""
    from safetensors.torch import save_file

    source = tmp_path / "source"
    write_model(source, tie_word_embeddings=True)
    tensors = stored_tensors(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    if pickled:
        as_pickle(source)
    assert imported(source, tmp_path / "runs").results["parity"]["passed"]


def test_an_export_loads_in_transformers_and_gives_the_ids_of_training(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    monkeypatch.setattr(exporting, "SHARD_BYTES", 20_000)
    run = imported(llama, tmp_path / "runs")
    folder = exported(run, tmp_path / "export")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in folder.glob("model-*.safetensors")}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored_tensors(folder).values())

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ours = TrainedModel.open(run.path).tokenizer()
    assert tokenizer("2 + 3 = 5")["input_ids"] == ours.encode("2 + 3 = 5"), "no <s>, which our training never adds"
    assert (tokenizer.eos_token_id, tokenizer.eos_token, tokenizer.pad_token_id) == (2, "</s>", 2)
    assert (model.config.eos_token_id, model.config.pad_token_id, model.dtype) == (2, None, torch.float32)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    assert model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=4).shape[1] <= 6


def test_the_default_place_of_an_export_is_the_run_folder(tmp_path: Path, llama: Path) -> None:
    run = imported(llama, tmp_path / "runs")
    assert export_model(run.path, None, NoProgress()) == run.path / "huggingface/step-0"
    assert export_model(run.path, None, NoProgress(), "bfloat16", parity=False).name == "step-0-bfloat16"
    assert not (run.path / "huggingface/step-0-bfloat16/parity.json").exists()
    with pytest.raises(UserError, match="is there already"):
        export_model(run.path, None, NoProgress())


# --- the run folder ---


def test_an_import_is_a_run_that_is_done_once(tmp_path: Path, llama: Path) -> None:
    run = imported(llama, tmp_path / "runs", weight_decay=0.1, tokens=1000)
    trained = TrainedModel.open(run.path)
    assert (run.kind, trained.identity, trained.checkpoint.step) == ("import", run.hash, 0)
    assert trained.tokenizer().end_of_text == 2
    assert not list(run.path.glob("checkpoints/*/exp_avg*"))
    assert not (run.path / "unchecked").exists()
    written = (run.path / "checkpoints/step-0/COMPLETE").stat().st_mtime_ns
    assert imported(llama, tmp_path / "runs", weight_decay=0.1, tokens=1000) == run
    assert (run.path / "checkpoints/step-0/COMPLETE").stat().st_mtime_ns == written


def test_labels_can_be_corrected_and_a_skipped_check_made_up_for(tmp_path: Path, llama: Path) -> None:
    first = imported(llama, tmp_path / "runs", weight_decay=1.0, parity=False)
    assert first.results["parity"] is None
    second = imported(llama, tmp_path / "runs", weight_decay=0.1)
    assert second == first
    assert second.results["parity"]["passed"]
    assert second.results["weight_decay"] == 0.1
    config = second.config
    assert isinstance(config, ImportConfig)
    assert config.weight_decay == 0.1


def test_a_skipped_check_that_fails_later_takes_the_weights_away(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = importing.imported_tensors

    def wrong(source: Any, progress: Any) -> Any:
        tensors = dict(right(source, progress))
        return iter(corrupted(tensors, {name: name for name in tensors}, "swapped gate").items())

    with monkeypatch.context() as patch:
        patch.setattr(importing, "imported_tensors", wrong)
        run = imported(llama, tmp_path / "runs", parity=False)
    with pytest.raises(UserError, match="do not agree"):
        imported(llama, tmp_path / "runs")
    assert run.state.status == "failed"
    assert "do not agree" in (run.state.error or "")
    assert list(run.path.rglob("*.safetensors")) == []
    with pytest.raises(UserError):
        TrainedModel.open(run.path)
    assert imported(llama, tmp_path / "runs").results["parity"]["passed"], "it may be imported again"


def test_a_number_that_is_not_finite_is_refused_without_a_parity_check(tmp_path: Path, llama: Path) -> None:
    from safetensors.torch import save_file

    source = copy(llama, tmp_path / "source")
    tensors = stored_tensors(source)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds numbers that are not finite"):
        imported(source, tmp_path / "runs", parity=False)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_the_content_of_the_source_and_the_tokenizer_name_the_run(tmp_path: Path, llama: Path) -> None:
    run = imported(llama, tmp_path / "runs", parity=False)
    moved = copy(llama, tmp_path / "moved")
    assert imported(moved, tmp_path / "runs", parity=False) == run
    write_model(tmp_path / "other", seed=1)
    assert imported(tmp_path / "other", tmp_path / "runs", parity=False) != run
    tokenizer = json.loads((moved / "tokenizer.json").read_text())
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    assert imported(moved, tmp_path / "runs", parity=False) != run
    (moved / "tokenizer.json").unlink()
    assert imported(moved, tmp_path / "runs", parity=False, tokenizer=str(llama)).inputs["tokenizer"] == run.inputs["tokenizer"]


def test_an_imported_model_has_no_pretraining_data(tmp_path: Path, llama: Path) -> None:
    run = imported(llama, tmp_path / "runs", parity=False)
    with pytest.raises(UserError, match="pretrained elsewhere"):
        TrainedModel.open(run.path).pretraining_run()


# --- what a receipt finds ---


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Rows of 4 heads in the order of Meta's own checkpoints, where the two halves of a rotation alternate."""
    return weight.unflatten(0, (4, 2, -1)).transpose(1, 2).flatten(0, 2)


def corrupted(tensors: dict[str, torch.Tensor], names: dict[str, str], fault: str) -> dict[str, torch.Tensor]:
    """`tensors` with one fault in layer 0; `names` says how they are called."""
    prefix = "layers.0."
    match fault:
        case "q permutation":
            query = names[prefix + "attn.q_proj.weight"]
            return tensors | {query: interleaved(tensors[query])}
        case "missing norm":
            gain = names[prefix + "attn_norm.weight"]
            return tensors | {gain: torch.ones_like(tensors[gain])}
        case _:
            gate, up = names[prefix + "mlp.gate_proj.weight"], names[prefix + "mlp.up_proj.weight"]
            return tensors | {gate: tensors[up], up: tensors[gate]}


FAULTS = pytest.mark.parametrize("fault", ["q permutation", "missing norm", "swapped gate"])


@FAMILIES
@FAULTS
def test_a_faulty_export_fails_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, fault: str
) -> None:
    write_model(tmp_path / "source", model_type)
    run = imported(tmp_path / "source", tmp_path / "runs", parity=False)
    right = exporting.exported_tensors

    def wrong(weights: Any, names: Any, dtype: torch.dtype) -> Any:
        return iter(corrupted(dict(right(weights, names, dtype)), names, fault).items())

    monkeypatch.setattr(exporting, "exported_tensors", wrong)
    with pytest.raises(UserError, match="do not agree"):
        exported(run, tmp_path / "exports/model")
    assert list((tmp_path / "exports").iterdir()) == []


@FAMILIES
@FAULTS
def test_a_faulty_import_fails_and_leaves_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, fault: str
) -> None:
    write_model(tmp_path / "source", model_type)
    right = importing.imported_tensors

    def wrong(source: Any, progress: Any) -> Any:
        tensors = dict(right(source, progress))
        return iter(corrupted(tensors, {name: name for name in tensors}, fault).items())

    monkeypatch.setattr(importing, "imported_tensors", wrong)
    with pytest.raises(UserError, match="do not agree"):
        imported(tmp_path / "source", tmp_path / "runs")
    (run,) = (tmp_path / "runs").iterdir()
    assert RunFolder.open(run).state.status == "failed"
    assert list(run.rglob("*.safetensors")) == []
    with pytest.raises(UserError):
        TrainedModel.open(run)


def test_logits_that_are_not_numbers_do_not_pass() -> None:
    logits = torch.randn(2, 3, 5)
    assert compare(logits, logits.clone())["passed"]
    assert compare(logits, logits.clone())["mean_kl"] == 0
    assert not compare(logits, logits * torch.nan)["passed"]
    assert not compare(logits, logits + 0.01 * torch.randn(2, 3, 5))["passed"]


def test_a_norm_that_is_not_there_is_found_even_where_its_gain_is_one(tmp_path: Path, llama: Path) -> None:
    from safetensors.torch import save_file

    run = imported(llama, tmp_path / "runs", parity=False)
    folder = exported(run, tmp_path / "export")
    tensors = stored_tensors(folder)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing_keys: model.layers.1.input_layernorm.weight"):
        check_parity(TrainedModel.open(run.path).checkpoint, folder)


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope_parameters="),
        ({"model_type": "olmo"}, "model_type 'olmo' is not supported; expected one of llama, olmo2"),
        ({"model_type": "hf_olmo"}, "convert_olmo2_weights_to_hf"),
        ({"num_attention_heads": 5}, "must equal hidden_size"),
        ({"tie_word_embeddings": True}, "the config ties the embeddings"),
        ({"vocab_size": 80}, r"model.embed_tokens.weight is \(96, 32\), expected \(80, 32\)"),
    ],
)
def test_a_model_that_is_not_ours_is_refused(tmp_path: Path, llama: Path, changes: dict[str, Any], message: str) -> None:
    source = copy(llama, tmp_path / "source")
    change_config(source, **changes)
    with pytest.raises(UserError, match=message):
        imported(source, tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model": {"d_model": 2048}, "train_module": {}}', "OLMo-core's own checkpoint"),
        ("model_and_optim/.metadata", "", "OLMo-core's own checkpoint"),
        ("config.yaml", "d_model: 2048", "OLMo's own checkpoint"),
        ("lit_model.pth", "", "LitGPT"),
        ("params.json", "{}", "Meta's own checkpoint"),
        ("adapter_config.json", "{}", "an adapter"),
        ("README.md", "", "has no config.json"),
        ("config.json", "[]", "expected a JSON object"),
    ],
)
def test_other_formats_are_told_by_name(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / "source" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "source", tmp_path / "runs")


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path, llama: Path) -> None:
    def fails(source: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            imported(source, tmp_path / "runs")

    weightless = copy(llama, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    fails(weightless, "has no weights; expected model.safetensors")
    (weightless / "model.safetensors").write_bytes(b"damaged")
    fails(weightless, "not a readable safetensors file")
    (weightless / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    fails(weightless, "are missing: model-1.safetensors")
    (weightless / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    fails(weightless, "outside its folder")
    (weightless / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    fails(weightless, "cannot be read as an index of shards")
    untold = copy(llama, tmp_path / "untold")
    (untold / "tokenizer.json").unlink()
    fails(untold, "has no tokenizer.json. Set `tokenizer`")
    (untold / "tokenizer.model").write_bytes(b"")
    fails(untold, "its tokenizer.model alone will not do")
    fails(tmp_path / "no such folder", "no name on the Hugging Face hub")
    assert not (tmp_path / "runs").exists()


def test_a_pickle_is_data_or_nothing(tmp_path: Path, llama: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    source = copy(llama, tmp_path / "source")
    as_pickle(source)
    torch.save({"model.norm.weight": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="nothing else in it is executed"):
        imported(source, tmp_path / "runs")
    assert not (tmp_path / "executed").exists()


def test_quantised_tensors_are_refused_though_the_config_is_silent(tmp_path: Path, llama: Path) -> None:
    from safetensors.torch import save_file

    source = copy(llama, tmp_path / "source")
    tensors = stored_tensors(source)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight is stored as I8"):
        imported(source, tmp_path / "runs")


def test_the_end_of_text_is_that_of_pretraining(tmp_path: Path, llama: Path) -> None:
    def found(name: str, ids: Any, generation: Any = None) -> int:
        source = copy(llama, tmp_path / name)
        change_config(source, eos_token_id=ids)
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        return find_source(ImportConfig(name="m", source=str(source))).tokenizer.end_of_text

    assert {found("one", 2), found("several", [5, 2]), found("beside", None, 2), found("silent", None)} == {2}
    for name, stated in {"other": (5,), "others": ([5, 6],), "other beside": (None, 5)}.items():
        with pytest.raises(UserError, match=r"eos_token_id is .*5.*end-of-text token has id 2"):
            found(name, *stated)


def test_what_transformers_cannot_load_is_one_message(tmp_path: Path, llama: Path) -> None:
    run = imported(llama, tmp_path / "runs", parity=False)
    source = copy(llama, tmp_path / "source")
    change_config(source, num_hidden_layers="two")
    with pytest.raises(UserError, match="source: transformers cannot load it"):
        check_parity(TrainedModel.open(run.path).checkpoint, source)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "source", vocab_size=60)
    with pytest.raises(UserError, match="vocab_size=60 is too small"):
        imported(tmp_path / "source", tmp_path / "runs")


# --- the hub ---


def test_a_hub_name_is_fetched_small_files_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = tmp_path / "models--owner--model/snapshots/0123abcd"
    write_model(snapshot)
    calls: list[tuple[str, str, list[str]]] = []

    def fetched(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    recipe = ImportConfig(name="model", source="owner/model", revision="step-9")
    assert find_source(recipe).identity == "owner/model@0123abcd"
    assert [call[:2] for call in calls] == [("owner/model", "step-9")] * 2
    assert "model*.safetensors" in calls[1][2]
    assert not any("safetensors" in pattern for pattern in calls[0][2])
    change_config(snapshot, model_type="gpt2")
    with pytest.raises(UserError, match="model_type 'gpt2'"):
        find_source(recipe)
    assert len(calls) == 3, "nothing large was fetched"


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)cannot be had from the Hugging Face hub.*hf download owner/model --local-dir"):
        import_model(ImportConfig(name="model", source="owner/model", output=tmp_path), NoProgress())


def test_a_tokenizer_may_come_from_a_file(tmp_path: Path, llama: Path) -> None:
    write_tokenizer(tmp_path / "elsewhere")
    source = copy(llama, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    recipe = ImportConfig(name="model", source=str(source), tokenizer=str(tmp_path / "elsewhere/tokenizer.json"))
    assert find_source(recipe).tokenizer.vocab_size == find_source(ImportConfig(name="m", source=str(llama))).tokenizer.vocab_size
