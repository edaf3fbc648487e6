"""Studies without pretraining: base models that come from Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_plasticity.cli import main
from megatron_plasticity.config.hashing import canonical
from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.config.load import check_config, load_config, merge
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.training import FinetuneConfig
from megatron_plasticity.errors import ConfigError
from megatron_plasticity.models.huggingface import model_config_from_huggingface
from megatron_plasticity.study.check import check_sources, check_study
from megatron_plasticity.study.plan import plan_study
from megatron_plasticity.study.report import write_report
from megatron_plasticity.study.results import collect
from megatron_plasticity.study.runner import run_study
from tests.interchange.folders import SHAPE, write_model
from tests.study.small import small_study, small_tree

INPUTS = {"source": "s", "tokenizer": "t"}
OTHER = INPUTS | {"source": "other"}


def tree(folder: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The small study with two imported bases, `folder/a` and `folder/b`, in place of its grid."""
    small = {key: value for key, value in small_tree(folder).items() if key not in ("base", "axes", "corpus")}
    small["analyses"] = {"probes": small["analyses"]["probes"], "attention": {"map_sequences": 0}}
    small["bases"] = [
        {"name": name, "source": str(folder / name), "weight_decay": weight_decay, "tokens": 1000}
        for name, weight_decay in (("a", 0.0), ("b", 1.0))
    ]
    return merge(small, changes or {})


def study(folder: Path, changes: dict[str, Any] | None = None) -> StudyConfig:
    return check_config(StudyConfig, tree(folder, changes), "imported study")


def test_an_import_takes_the_place_of_a_pretraining_run(tmp_path: Path) -> None:
    plan = plan_study(study(tmp_path), sources={"a": INPUTS, "b": OTHER})
    assert [(cell.id, cell.parent) for cell in plan.cells if cell.weight_decay == 1.0] == [
        ("import-b", None),
        ("probes-b", "import-b"),
        ("attention-b", "import-b"),
        ("evaluate-b", "import-b"),
        ("finetune-b-arithmetic", "import-b"),
        ("evaluate-b-arithmetic", "finetune-b-arithmetic"),
    ]
    root = next(cell for cell in plan.cells if cell.id == "import-b")
    assert isinstance(root.config, ImportConfig)
    assert (root.config.output, root.config.weight_decay) == (plan.folder, 1.0)
    assert len({cell.folder for cell in plan.cells}) == len(plan.cells) == 12
    assert json.dumps([cell.to_json() for cell in plan.cells], allow_nan=False)


def test_what_lies_at_the_source_enters_every_hash(tmp_path: Path) -> None:
    def folders(source: str) -> set[Path]:
        sources = {name: INPUTS | {"source": f"{source} {name}"} for name in "ab"}
        return {cell.folder for cell in plan_study(study(tmp_path), sources=sources).cells}

    assert not folders("one") & folders("other")


def test_a_corrected_label_leaves_the_runs_alone(tmp_path: Path) -> None:
    sources = {"a": INPUTS, "b": OTHER}
    before = plan_study(study(tmp_path), sources=sources)
    bases = [base | {"weight_decay": base["weight_decay"] + 0.3} for base in tree(tmp_path)["bases"]]
    after = plan_study(study(tmp_path, {"bases": bases}), sources=sources)
    assert [cell.folder for cell in before.cells] == [cell.folder for cell in after.cells]


def test_a_base_may_be_fine_tuned_in_its_own_way(tmp_path: Path) -> None:
    first, second = tree(tmp_path)["bases"]
    bases = [first | {"finetune": {"optimizer": {"learning_rate": 0.25}}, "group": "a"}, second | {"group": "b"}]
    plan = plan_study(study(tmp_path, {"bases": bases}), sources={"a": INPUTS, "b": OTHER})
    rates = [cell.config.optimizer.learning_rate for cell in plan.cells if isinstance(cell.config, FinetuneConfig)]
    assert rates == [0.25, 0.001]


def test_names_that_would_meet_are_refused(tmp_path: Path) -> None:
    first, second = tree(tmp_path)["bases"]
    config = study(tmp_path, {"bases": [first, second | {"name": "a-arithmetic"}]})
    with pytest.raises(ConfigError, match=r"two runs would have one name; .*: evaluate-a-arithmetic"):
        plan_study(config, sources={"a": INPUTS, "a-arithmetic": INPUTS})


def test_one_model_under_two_names_is_refused(tmp_path: Path) -> None:
    """It would count as evidence for two values of λ."""
    with pytest.raises(ConfigError, match=r"bases: import-a and import-b are one run under two names"):
        plan_study(study(tmp_path), sources={"a": INPUTS, "b": INPUTS})


def test_groups_are_compared_apart(tmp_path: Path) -> None:
    bases = [base | {"group": base["name"], "weight_decay": 0.1} for base in tree(tmp_path)["bases"]]
    plan = plan_study(study(tmp_path, {"bases": bases}), sources={"a": INPUTS, "b": OTHER})
    assert [cell.point for cell in plan.cells if cell.kind == "import"] == [
        {"optimizer.weight_decay": 0.1, "group": "a"},
        {"optimizer.weight_decay": 0.1, "group": "b"},
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"steps": 3}}, r"`base` is about pretraining, and with `bases` nothing is pretrained"),
        ({"axes": {"seed": [1]}}, r"`axes` is about pretraining"),
        ({"corpus": {"name": "c"}}, r"`corpus` is about pretraining"),
        ({"bases": []}, r"state `base` and `axes` .* or `bases`"),
        ({"bases": [{"name": "a", "source": "x"}]}, r"a needs `weight_decay`"),
        ({"bases": [{"name": "a", "source": "x", "weight_decay": 1}] * 2}, r"a is named twice"),
        (
            {"bases": [{"name": name, "source": "x", "weight_decay": 1} for name in "ab"]},
            r"two models of group '' have λ = 1; give what differs otherwise another `group`",
        ),
        ({"bases": [{"name": "a", "source": "x", "weight_decay": 1, "finetune": {"epoch": 2}}]}, r"epoch: unknown key"),
        (
            {
                "bases": [
                    {"name": "a", "source": "x", "weight_decay": 1, "group": "g"},
                    {"name": "b", "source": "x", "weight_decay": 0, "group": "g", "finetune": {"epochs": 7}},
                ]
            },
            r"a and b of group 'g' are compared for λ only, but differ in `finetune`",
        ),
        ({"finetune_steps": [2]}, r"`finetune_steps`: a model that was pretrained elsewhere has one checkpoint"),
        (
            {
                "bases": [{"name": "a", "source": "x", "weight_decay": 1, "finetune": {"epochs": 7}}],
                "finetune_axes": {"epochs": [1, 2]},
            },
            r"a changes finetune\.epochs, which is one of `finetune_axes`",
        ),
        ({"analyses": {"overfitting": {}}}, r"analyses\.overfitting: the gap is over the data of pretraining"),
        ({"analyses": {"features": {}}}, r"analyses\.features: .* name a text to take them from by `text`"),
        ({"analyses": {"features": {"text": "nothing.txt"}}}, r"nothing\.txt: expected a text file, which cannot be read"),
        ({"analyses": {"attention": {"map_sequences": 4}}}, r"map_sequences: .* set it to 0"),
        ({"evaluate": None}, r"`finetune` and `evaluate` must be there"),
    ],
)
def test_a_study_that_cannot_work_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_study(study(tmp_path, changes))


def test_a_source_that_does_not_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    write_model(tmp_path / "a", seed=0)
    write_model(tmp_path / "b", seed=1)
    with pytest.raises(ConfigError, match=r"finetune of a: max_length=161 exceeds .* context_length=160"):
        run_study(study(tmp_path, {"finetune": {"max_length": 161}}))
    assert not list((tmp_path / "runs/small").glob("import-*"))


def test_models_of_one_group_have_one_architecture(tmp_path: Path) -> None:
    values = {**SHAPE, "model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 512}
    models = {
        name: model_config_from_huggingface(values | {"model_type": kind}) for name, kind in (("a", "llama"), ("b", "olmo2"))
    }
    with pytest.raises(ConfigError, match=r"a and b of group '' are compared for λ only, but differ in family"):
        check_sources(study(tmp_path), models)
    apart = [base | {"group": base["name"]} for base in tree(tmp_path)["bases"]]
    check_sources(study(tmp_path, {"bases": apart}), models)


def test_the_hash_of_a_study_with_a_grid_is_what_it_was(tmp_path: Path) -> None:
    assert "bases" not in canonical(small_study(tmp_path))


def test_the_shipped_study_has_the_public_checkpoints(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = repository / "configs/studies/from-public-checkpoints.yaml"
    config = load_config(StudyConfig, path)
    check_study(config, tasks_needed=False)
    grids: dict[str, list[float | None]] = {}
    for base in config.bases:
        grids.setdefault(base.group, []).append(base.weight_decay)
        assert base.name == f"{base.group}-wd{base.weight_decay:g}"
        rate = 7.5e-6 if base.group == "llama2-4b-20x" else None
        assert base.finetune == ({"optimizer": {"learning_rate": rate}} if rate else {})
    assert grids == {
        "olmo2-1b-20x": [0, 0.1, 0.3, 0.6, 1],
        "olmo2-1b-140x": [0, 0.1, 0.3, 1],
        "llama2-4b-20x": [0, 0.1, 1],
    }
    with pytest.raises(SystemExit) as ended:
        main(["study", "plan", str(path)])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "sbordt/OLMo-2-1B-7x-WD03" in out
    assert "12 base models, 192 runs in all" in out


@pytest.mark.slow
def test_from_hugging_face_folders_to_a_report(tmp_path: Path) -> None:
    write_model(tmp_path / "a", seed=0)
    write_model(tmp_path / "b", "olmo2", seed=1)
    path = tmp_path / "study.yaml"
    # Two architectures, so two groups.
    changes = {"bases": [base | {"group": base["name"]} for base in tree(tmp_path)["bases"]]}
    path.write_text(yaml.safe_dump(tree(tmp_path, changes)))
    config = load_config(StudyConfig, path)
    outcome = run_study(config)
    assert (outcome.failed, outcome.not_started, len(outcome.done)) == ({}, (), 12)

    results = collect(outcome.folder)
    assert results.weight_decays == (0.0, 1.0)
    models = [model for group in results.groups for model in group.models]
    assert len(results.groups) == 2
    assert [sorted(model.finetuned_scores) for model in models] == [["arithmetic"], ["arithmetic"]]
    assert all(model.probes and model.attention for model in models)
    assert all(model.pretrain.results["parity"]["passed"] for model in models)

    page = write_report(outcome.folder).read_text()
    assert "<svg" in page
    assert "were pretrained elsewhere" in page
    assert "nothing to compare" not in page
    assert "1 thousand tokens" in page

    assert len(run_study(config).done) == 12, "what is done is not done again"
