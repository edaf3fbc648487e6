"""Every config that ships says which kind it is, loads as that kind, and holds the paper's numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from megatron_plasticity.config.base import Section
from megatron_plasticity.config.data import CorpusConfig
from megatron_plasticity.config.hashing import KINDS
from megatron_plasticity.config.load import check_config, load_config
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.training import FinetuneRecipe, PretrainConfig
from megatron_plasticity.data.prepare import prepared_folder
from megatron_plasticity.models.sizes import parameter_count
from megatron_plasticity.study.check import check_study

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))
CLASSES: dict[str, type[Section]] = {**KINDS, "model": ModelConfig, "finetune-recipe": FinetuneRecipe}
MODELINE = re.compile(r"# yaml-language-server: \$schema=(\S+/([a-z-]+)\.json)\n")

each_shipped_config = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(CONFIGS).as_posix())


def claimed_kind(path: Path) -> str:
    match = MODELINE.match(path.read_text(encoding="utf-8"))
    assert match, f"{path} does not name its schema in its first line"
    assert (path.parent / match[1]).is_file(), f"{path} names a schema that is not there"
    return match[2]


def load_run(name: str) -> PretrainConfig:
    return load_config(PretrainConfig, CONFIGS / "runs" / f"{name}.yaml")


def test_all_that_is_promised_ships() -> None:
    shipped = {path.relative_to(CONFIGS).as_posix() for path in SHIPPED}
    models = {f"models/llama2-{size}.yaml" for size in ("125m", "250m", "0.5b", "1b", "2b", "4b", "debug", "quickstart")}
    runs = {f"runs/{name}.yaml" for name in PAPER_RUNS} | {"runs/llama2-debug.yaml", "runs/olmo2-debug.yaml"}
    others = {"corpora/quickstart.yaml", "finetune/paper.yaml", "studies/quickstart.yaml"}
    assert models | {"models/olmo2-1b.yaml", "models/olmo2-debug.yaml"} | runs | others <= shipped


@each_shipped_config
def test_loads_as_what_it_claims_to_be(path: Path) -> None:
    load_config(CLASSES[claimed_kind(path)], path)


@each_shipped_config
def test_satisfies_its_editor_schema_as_written(path: Path) -> None:
    schema = json.loads((ROOT / "docs" / "schema" / f"{claimed_kind(path)}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@each_shipped_config
def test_run_and_study_are_called_like_their_file(path: Path) -> None:
    name = yaml.safe_load(path.read_text(encoding="utf-8")).get("name", path.stem)
    assert name in (path.stem, "debug"), "a run is called after its file"


def strings_in(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [text for value in node.values() for text in strings_in(value)]
    if isinstance(node, list):
        return [text for value in node for text in strings_in(value)]
    return [node] if isinstance(node, str) else []


@each_shipped_config
def test_numbers_are_numbers_for_yaml_too(path: Path) -> None:
    """PyYAML reads 1e-5 as text. Typed fields coerce it, but the axes of a study would hold a string."""
    strings = strings_in(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert [text for text in strings if re.fullmatch(r"[-+]?[\d._]+([eE][-+]?\d+)?", text)] == []


# --- the paper's numbers (arXiv 2602.11137) ---

PAPER_MODELS = {
    "llama2-0.5b": (500_921_856, 402_617_856),
    "llama2-1b": (1_000_564_736, 869_492_736),
    "llama2-4b": (4_000_288_768, 3_738_144_768),
    "olmo2-1b": (1_484_916_736, 1_073_874_944),
}


@pytest.mark.parametrize(("name", "total", "non_embedding"), [(name, *counts) for name, counts in PAPER_MODELS.items()])
def test_parameter_counts_of_the_paper(name: str, total: int, non_embedding: int) -> None:
    counts = parameter_count(load_config(ModelConfig, CONFIGS / "models" / f"{name}.yaml"))
    assert (counts.total, counts.non_embedding) == (total, non_embedding)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("models/*.yaml")), ids=lambda path: path.stem)
def test_parameter_counts_in_comments_and_names(path: Path) -> None:
    """A number of parameters that a head comment states is exact, and a size in a file name is right to a hundredth."""
    total = parameter_count(load_config(ModelConfig, path)).total
    stated = re.search(r"([\d,]+) parameters", path.read_text(encoding="utf-8"))
    if stated:
        assert int(stated[1].replace(",", "")) == total
    size = re.search(r"-([\d.]+)([mb])$", path.stem)
    if size and path.stem != "olmo2-1b":  # OLMo-2 counts without its embeddings
        assert total == pytest.approx(float(size[1]) * {"m": 1e6, "b": 1e9}[size[2]], rel=0.01)
    assert stated or size or "debug" in path.stem, "neither a name nor a comment says how large this model is"


# name: steps, tokens in billions, peak learning rate, sequences per step, decay scope, schedule, final fraction
PAPER_RUNS = {
    "llama2-0.5b-20x": (9_537, 10, 2.5e-4, 512, "all", "cosine", 0.1),
    "llama2-1b-20x": (19_073, 20, 2.0e-4, 512, "all", "cosine", 0.1),
    "llama2-4b-20x": (38_147, 80, 1.5e-4, 1024, "all", "cosine", 0.1),
    "olmo2-1b-20x": (14_305, 30, 4.0e-4, 512, "no_token_embedding", "cosine", 0.1),
    "olmo2-1b-140x": (100_136, 210, 4.0e-4, 512, "no_token_embedding", "wsd", 0.0),
}


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_recipes_of_the_paper(name: str) -> None:
    run = load_run(name)
    found = (
        run.total_steps,
        round(run.total_steps * run.tokens_per_step / 1e9),
        run.optimizer.learning_rate,
        run.batch.global_batch_size,
        run.optimizer.decay.scope,
        run.schedule.kind,
        run.schedule.final_fraction,
    )
    assert found == PAPER_RUNS[name]
    assert (run.optimizer.betas, run.optimizer.eps, run.optimizer.gradient_clip) == ((0.9, 0.95), 1e-8, 1.0)
    assert (run.optimizer.decay.coupling, run.engine.precision, run.seed) == ("lr", "bf16", 42)
    assert run.data.held_out_sequences * run.model.context_length == pytest.approx(50e6, rel=1e-3)


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_multiple_of_tokens_per_parameter_is_in_the_name(name: str) -> None:
    run = load_run(name)
    assert run.tokens is not None
    assert run.tokens / parameter_count(run.model).total == pytest.approx(float(name.split("-")[-1].removesuffix("x")), rel=0.02)


def test_fine_tuning_recipe_of_the_paper() -> None:
    recipe = load_config(FinetuneRecipe, CONFIGS / "finetune/paper.yaml")
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.betas) == (1e-5, 0.0, (0.9, 0.999))
    assert (recipe.batch.global_batch_size, recipe.epochs, recipe.max_length) == (64, 3, 2048)
    assert (recipe.schedule.kind, recipe.schedule.warmup_fraction, recipe.schedule.final_fraction) == ("cosine", 0.1, 0.0)
    assert recipe.template == "Human: {prompt}\nAssistant:"


# --- what the quickstart and the debug runs share ---


def test_every_value_of_the_quickstart_grid_makes_a_run() -> None:
    study = load_config(StudyConfig, CONFIGS / "studies/quickstart.yaml")
    assert study.corpus is not None
    for path, values in study.axes.items():
        section, key = path.split(".")
        for value in values:
            base = study.base | {"name": "cell", section: study.base[section] | {key: value}}
            base["data"] = study.base.get("data", {}) | {"folder": "data/any"}
            run = check_config(PretrainConfig, base, "the quickstart's base")
            assert run.model.vocab_size >= study.corpus.tokenizer.vocab_size


def test_quickstart_spreads_five_values_of_weight_decay() -> None:
    study = load_config(StudyConfig, CONFIGS / "studies/quickstart.yaml")
    ((path, values),) = study.axes.items()
    assert path in ("optimizer.adamw_timescale", "optimizer.weight_decay")
    assert len(values) == 5
    assert [task.name for task in study.tasks] == ["arithmetic", "algebra", "categories", "trials", "passage", "steps"]


@pytest.mark.parametrize("name", ["llama2-debug", "olmo2-debug"])
def test_debug_runs_read_the_quickstart_corpus(name: str) -> None:
    run = load_run(name)
    corpus = load_config(CorpusConfig, CONFIGS / "corpora/quickstart.yaml")
    assert run.data.folder == prepared_folder(corpus).with_name(corpus.name), "`data prepare` leaves a link of this name"
    assert run.model.vocab_size >= corpus.tokenizer.vocab_size
    assert (run.total_steps, run.device, run.engine.precision) == (20, "cpu", "fp32")


def test_kinds_are_those_that_have_a_schema() -> None:
    assert {path.stem for path in (ROOT / "docs/schema").glob("*.json")} == set(CLASSES)


LLAMA_GRID = [0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 1.5, 3.0, 10.0]
# name: run, λ grid, learning rate of fine-tuning
PAPER_STUDIES = {
    "paper-llama2-0.5b": ("llama2-0.5b-20x", LLAMA_GRID, 1e-5),
    "paper-llama2-1b": ("llama2-1b-20x", LLAMA_GRID, 1e-5),
    "paper-llama2-4b": ("llama2-4b-20x", [0.0, 0.1, 1.0], 7.5e-6),
    "paper-olmo2-20x": ("olmo2-1b-20x", [0.0, 0.1, 0.3, 0.6, 1.0], 1e-5),
    "paper-olmo2-140x": ("olmo2-1b-140x", [0.0, 0.1, 0.3, 1.0], 1e-5),
}


@pytest.mark.parametrize("name", PAPER_STUDIES)
def test_studies_of_the_paper(name: str) -> None:
    run, grid, learning_rate = PAPER_STUDIES[name]
    study = load_config(StudyConfig, CONFIGS / "studies" / f"{name}.yaml")
    bases = check_study(study, tasks_needed=False)
    assert [base.weight_decay for base in bases] == grid
    stays = {"name", "output", "logging", "optimizer"}
    for base in bases:
        assert base.model_dump(exclude=stays) == load_run(run).model_dump(exclude=stays)
        assert base.optimizer.model_dump(exclude={"weight_decay"}) == load_run(run).optimizer.model_dump(exclude={"weight_decay"})
    assert study.finetune is not None
    assert study.evaluate is not None
    assert study.finetune.optimizer.learning_rate == learning_rate
    assert (study.evaluate.paper_compat, study.evaluate.samples) == (True, 16)
    assert [task.name for task in study.tasks] == [
        "metamathqa",
        "simplescaling",
        "medmcqa-cot",
        "pubmedqa",
        "mmlu-pro-cot",
        "race",
    ]
    assert all(task.train_examples is None and task.test_examples is None for task in study.tasks)
