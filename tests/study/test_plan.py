"""From a grid to a graph of runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_plasticity.cli import main
from megatron_plasticity.config.analysis import ProbesConfig
from megatron_plasticity.config.evaluation import EvaluateConfig
from megatron_plasticity.config.files import sha256_file
from megatron_plasticity.config.hashing import canonical, config_hash
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.data.probe_sets import probe_inputs
from megatron_plasticity.errors import ConfigError, UserError
from megatron_plasticity.study.check import check_study, task_problems
from megatron_plasticity.study.plan import PlannedCell, plan_study
from tests.study.small import small_study


def test_each_base_model_gets_its_descendants(tmp_path: Path) -> None:
    plan = plan_study(small_study(tmp_path), "corpus-hash")
    assert [cell.id for cell in plan.cells if cell.weight_decay == 1.0] == [
        "pretrain-wd1",
        "probes-wd1",
        "attention-wd1",
        "overfitting-wd1",
        "features-wd1",
        "truncation-wd1",
        "evaluate-wd1",
        "finetune-wd1-arithmetic",
        "evaluate-wd1-arithmetic",
    ]
    parents = {cell.id: cell.parent for cell in plan.cells}
    assert parents["evaluate-wd1-arithmetic"] == "finetune-wd1-arithmetic"
    assert parents["finetune-wd1-arithmetic"] == "pretrain-wd1"
    assert parents["pretrain-wd1"] is None
    assert len({cell.folder for cell in plan.cells}) == len(plan.cells) == 18


def test_only_weight_decay_differs_between_the_points(tmp_path: Path) -> None:
    configs = [cell.config for cell in plan_study(small_study(tmp_path), "h").cells if cell.kind == "pretrain"]
    trees = [config.model_dump() for config in configs]
    for tree in trees:
        tree.pop("name")
        tree["optimizer"].pop("weight_decay")
    assert trees[0] == trees[1]


def test_a_timescale_becomes_a_weight_decay(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    axes = {"optimizer.adamw_timescale": (math.inf, 0.5)}
    study = study.model_copy(
        update={"axes": axes, "base": {**study.base, "optimizer": {"learning_rate": 0.005, "weight_decay": 9.0}}}
    )
    bases = check_study(study)
    assert [base.weight_decay for base in bases] == [0.0, pytest.approx(1 / (0.005 * 0.5 * 6))]
    cell = plan_study(study, "h").cells[0]
    assert cell.adamw_timescale is None
    assert json.dumps(cell.to_json(), allow_nan=False), "infinity has a name in study.json"


def test_the_corpus_and_the_base_enter_the_hash_of_what_follows(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    one, other = plan_study(study, "a"), plan_study(study, "b")
    assert not {cell.folder for cell in one.cells} & {cell.folder for cell in other.cells}
    longer = small_study(tmp_path, {"base": {"steps": 7}})
    assert not {cell.folder for cell in one.cells} & {cell.folder for cell in plan_study(longer, "a").cells}


def test_a_new_value_of_lambda_leaves_the_other_runs_alone(tmp_path: Path) -> None:
    before = {cell.folder for cell in plan_study(small_study(tmp_path), "a").cells}
    more = small_study(tmp_path, {"axes": {"optimizer.weight_decay": [0.0, 0.5, 1.0]}})
    after = {cell.folder for cell in plan_study(more, "a").cells}
    assert before < after


def test_other_axes_are_in_the_name(tmp_path: Path) -> None:
    study = small_study(tmp_path, {"axes": {"optimizer.weight_decay": [0.1], "seed": [1, 2]}})
    assert [base.name for base in check_study(study)] == ["wd0.1-seed1", "wd0.1-seed2"]


def test_any_value_makes_a_name(tmp_path: Path) -> None:
    study = small_study(tmp_path, {"axes": {"optimizer.weight_decay": [0.1], "optimizer.betas": [[0.9, 0.95], [0.9, 0.99]]}})
    assert [base.name for base in check_study(study)] == ["wd0.1-betas_0.9_0.95_", "wd0.1-betas_0.9_0.99_"]


def test_close_values_are_told_apart(tmp_path: Path) -> None:
    study = small_study(tmp_path, {"axes": {"optimizer.weight_decay": [0.33331, 0.33332]}})
    assert [base.name for base in check_study(study)] == ["wd0.33331", "wd0.33332"]


def test_one_mistake_in_the_base_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        check_study(small_study(tmp_path, {"base": {"stepps": 3}, "tasks": [{"name": "arithmetik"}]}))
    assert str(error.value).count("stepps") == 1
    assert "arithmetic" in str(error.value), "all problems at once"


def test_independent_coupling_has_its_own_timescale(tmp_path: Path) -> None:
    changes = {"base": {"optimizer": {"decay": {"coupling": "independent"}}}, "axes": {"optimizer.weight_decay": [0.01]}}
    assert plan_study(small_study(tmp_path, changes), "h").cells[0].adamw_timescale == pytest.approx(1 / (0.01 * 6))


def test_children_do_not_mirror_by_themselves(tmp_path: Path) -> None:
    for cell in plan_study(small_study(tmp_path), "a").cells:
        if isinstance(cell.config, PretrainConfig | FinetuneConfig):
            assert cell.config.logging.mlflow is False


def test_the_config_is_not_changed_by_planning(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    before = study.model_dump_json()
    plan_study(study, "a")
    assert study.model_dump_json() == before


PATTERNS = {"scope": "patterns", "patterns": [{"pattern": "nothing.*", "decay": True}, {"pattern": "*", "decay": False}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"model": {"kv_heads": 3}}}, r"kv_heads=3 must divide query_heads=4"),
        ({"base": {"batch": {"micro_batch_size": 4}}}, r"micro_batch_size=4 must divide global_batch_size=2"),
        ({"base": {"stepps": 3}}, r"stepps: unknown key; did you mean 'steps'"),
        ({"axes": {"optimizer.wieght_decay": [1]}}, r"optimizer\.wieght_decay: unknown key; did you mean 'weight_decay'"),
        ({"axes": {"data.folder": ["a", "b"]}}, r"axes: data\.folder: a study is of one text"),
        ({"axes": {"data.blend": [[], [{"folder": "a", "weight": 0.1}]]}}, r"axes: data\.blend: a study is of one text"),
        ({"resources": {"processes_per_run": 3}}, r"cannot be split over 3 data-parallel ranks"),
        ({"finetune": None}, r"`finetune` and `evaluate` must be there"),
        ({"finetune": {"max_length": 1000}}, r"finetune\.max_length=1000 exceeds the base model's context_length=160"),
        ({"evaluate": {"template": "{prompt}"}}, r"evaluate\.template differs"),
        (
            {"axes": {"optimizer.weight_decay": [0.1, "1e-1"]}},
            r"axes: two points of the grid are the same run: optimizer\.weight_decay=0\.1 and optimizer\.weight_decay='1e-1'",
        ),
        (
            {"axes": {"optimizer.weight_decay": [0.1], "batch.micro_batch_size": [1, 2]}},
            r"axes: two points .* same run: batch\.micro_batch_size=1 and batch\.micro_batch_size=2",
        ),
        (
            {"axes": {"optimizer.weight_decay": [0.1, 1], "optimizer.adamw_timescale": [0.1, 1]}},
            r"axes: optimizer\.weight_decay and optimizer\.adamw_timescale are two ways to state one λ; keep one",
        ),
        (
            {"axes": {"optimizer": [{"learning_rate": 0.1}], "optimizer.weight_decay": [0.1, 1]}},
            r"axes: of optimizer\.weight_decay and optimizer one is a part of the other",
        ),
        ({"base": {"capture": {"points": ["nope"]}}}, r"base\.capture: no hook point matches 'nope'"),
        ({"base": {"capture": {"steps": [7]}}}, r"base\.capture\.steps: \[7\] lie after the last step, 6"),
        ({"base": {"capture": {"texts": "nowhere.txt"}}}, r"base\.capture\.texts: nowhere\.txt: there is no such file"),
        ({"base": {"optimizer": {"decay": PATTERNS}}}, r"base\.optimizer\.decay\.patterns: 'nothing\.\*' matches no parameter"),
        ({"base": {"engine": {"deepspeed": {"optimizer": {}}}}}, r"base\.engine\.deepspeed\.optimizer: decided by our own"),
        ({"base": {"checkpoint": {"resume_from": "nowhere"}}}, r"base\.checkpoint\.resume_from: nowhere: no such checkpoint"),
    ],
)
def test_a_study_that_cannot_work_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_study(small_study(tmp_path, changes))


def test_what_is_wrong_with_its_runs_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    changes = {
        "base": {"capture": {"points": ["nope"]}, "optimizer": {"decay": PATTERNS}},
        "finetune": {"lora": {}, "capture": {"points": ["none"]}, "engine": {"deepspeed": {"fp16": {}}}, "max_length": 999},
    }
    with pytest.raises(ConfigError) as error:
        check_study(small_study(tmp_path, changes))
    for part in ("'nope'", "base.optimizer.decay", "needs the package peft", "'none'", "deepspeed.fp16", "max_length=999"):
        assert str(error.value).count(part) == 1, part


def test_points_are_what_a_config_makes_of_them(tmp_path: Path) -> None:
    """YAML reads 1e-1 as a text."""
    changes = {
        "axes": {"optimizer.weight_decay": ["1e-1", 1]},
        "finetune_axes": {"optimizer.learning_rate": ["1e-3"], "seed": ["7"]},
    }
    cells = {cell.id: cell for cell in plan_study(small_study(tmp_path, changes), "h").cells}
    finetune = cells["finetune-wd0.1-arithmetic-learning_rate0.001-seed7"]
    assert (finetune.point, finetune.variant) == ({"optimizer.weight_decay": 0.1}, {"optimizer.learning_rate": 0.001, "seed": 7})


def test_a_section_as_a_value_is_named_by_its_settings(tmp_path: Path) -> None:
    changes = {"finetune_axes": {"lora": [None, {"rank": 8, "targets": ["q_proj"]}], "optimizer.weight_decay": [0.1]}}
    cells = [cell for cell in plan_study(small_study(tmp_path, changes), "h").cells if cell.kind == "finetune"]
    assert [cell.id.removeprefix("finetune-wd0-arithmetic-") for cell in cells[:2]] == [
        "loranone-wd0.1",
        "lora-rank8-targets_q_proj_-wd0.1",
    ]
    assert cells[1].variant == {"lora": {"rank": 8, "targets": ["q_proj"]}, "optimizer.weight_decay": 0.1}


def test_a_run_that_is_there_is_taken_under_whatever_name_it_has(tmp_path: Path) -> None:
    """The digits of λ in a name depend on the other λ, and what is done shall not be done again."""
    before = plan_study(small_study(tmp_path, {"axes": {"optimizer.weight_decay": [0.1111, 0.2]}}), "h").cells
    for cell in before:
        cell.folder.mkdir(parents=True)
    assert before[0].folder.name.startswith("pretrain-wd0.111-")
    more = small_study(tmp_path, {"axes": {"optimizer.weight_decay": [0.1111, 0.1112, 0.2]}})
    after = plan_study(more, "h").cells
    assert [cell.id for cell in after if cell.kind == "pretrain"] == ["pretrain-wd0.1111", "pretrain-wd0.1112", "pretrain-wd0.2"]
    assert {cell.folder for cell in before} < {cell.folder for cell in after}
    assert len(after) == len(before) * 3 // 2
    for cell in after:
        digest = cell.folder.name.rsplit("-", 1)[1]
        assert cell.folder.name == f"{cell.kind}-{cell.config.name}-{digest}", "the run makes the folder that was planned"  # type: ignore[attr-defined]
    known = {cell.folder for cell in after}
    assert all(cell.config.run in known for cell in after if isinstance(cell.config, EvaluateConfig))


def test_what_dumps_read_enters_the_hash_that_was_planned(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    changes = {"base": {"capture": {"texts": str(texts)}}, "finetune": {"capture": {"texts": str(texts)}}}
    texts.write_text("one\n")
    study = small_study(tmp_path, changes)
    before = descendants(study)
    digest = {"capture_texts": sha256_file(texts)}
    texts.write_text("other\n")
    assert not {cell.folder for cell in before.values()} & {cell.folder for cell in descendants(study).values()}
    base, finetune = before["pretrain-wd1"], before["finetune-wd1-arithmetic"]
    assert base.folder.name.endswith(config_hash(base.config, corpus="h", **digest))
    assert finetune.folder.name.endswith(config_hash(finetune.config, base=base.folder.name.rsplit("-", 1)[1], **digest))


AXES = {"optimizer.weight_decay": [0.0, 0.1], "optimizer.learning_rate": [1e-5, 3e-5], "seed": [1, 2]}


def descendants(study: StudyConfig) -> dict[str, PlannedCell]:
    return {cell.id: cell for cell in plan_study(study, "h").cells if cell.weight_decay == 1.0}


def test_each_base_is_fine_tuned_in_every_way(tmp_path: Path) -> None:
    cells = descendants(small_study(tmp_path, {"finetune_axes": AXES}))
    finetunes = {id: cell for id, cell in cells.items() if cell.kind == "finetune"}
    assert len(finetunes) == 8
    cell = finetunes["finetune-wd1-arithmetic-wd0.1-learning_rate3e-05-seed2"]
    assert isinstance(cell.config, FinetuneConfig)
    assert (cell.config.optimizer.weight_decay, cell.config.optimizer.learning_rate, cell.config.seed) == (0.1, 3e-5, 2)
    assert cell.to_json()["variant"] == {"optimizer.weight_decay": 0.1, "optimizer.learning_rate": 3e-5, "seed": 2}
    evaluation = cells["evaluate-wd1-arithmetic-wd0.1-learning_rate3e-05-seed2"]
    assert (evaluation.parent, evaluation.variant) == (cell.id, cell.variant)
    assert isinstance(evaluation.config, EvaluateConfig)
    assert evaluation.config.run == cell.folder
    assert cells["evaluate-wd1"].to_json()["variant"] == {}


def test_a_new_value_of_an_axis_adds_only_its_runs(tmp_path: Path) -> None:
    before = plan_study(small_study(tmp_path, {"finetune_axes": AXES}), "h").cells
    more = {**AXES, "optimizer.learning_rate": [1e-5, 3e-5, 3.0000001e-5]}
    after = plan_study(small_study(tmp_path, {"finetune_axes": more}), "h").cells
    assert {cell.folder for cell in before} < {cell.folder for cell in after}
    assert len(after) - len(before) == 2 * 2 * 4


def test_without_the_settings_of_fine_tuning_names_and_hashes_are_what_they_were(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    assert not {"finetune_axes", "finetune_steps"} & canonical(study).keys()
    plain, varied = (plan_study(small_study(tmp_path, c), "h").cells for c in ({}, {"finetune_axes": {"seed": [42]}}))
    finetune = next(cell for cell in plain if cell.id == "finetune-wd1-arithmetic")
    base = next(cell for cell in plain if cell.id == "pretrain-wd1")
    digest = config_hash(finetune.config, base=base.folder.name.rsplit("-", 1)[1])
    assert finetune.folder.name == f"finetune-wd1-arithmetic-{digest}"
    same = next(cell for cell in varied if cell.id == "finetune-wd1-arithmetic-seed42")
    assert same.folder.name.endswith(digest), "the hash is of what is done, not of how it was asked for"


def test_a_timescale_of_fine_tuning_takes_the_place_of_its_weight_decay(tmp_path: Path) -> None:
    cells = descendants(small_study(tmp_path, {"finetune_axes": {"optimizer.adamw_timescale": [math.inf, 0.5]}}))
    cell = cells["finetune-wd1-arithmetic-adamw_timescale0.5"]
    assert isinstance(cell.config, FinetuneConfig)
    assert (cell.config.optimizer.weight_decay, cell.config.optimizer.adamw_timescale) == (None, 0.5)
    assert json.dumps([cell.to_json() for cell in cells.values()], allow_nan=False)


def test_earlier_checkpoints_are_fine_tuned_and_evaluated(tmp_path: Path) -> None:
    plain, cells = descendants(small_study(tmp_path)), descendants(small_study(tmp_path, {"finetune_steps": [4, 2]}))
    assert plain.items() <= cells.items()
    assert list(cells)[len(plain) :] == [
        f"{kind}-wd1-step{step}{task}"
        for step in (2, 4)
        for kind, task in (("evaluate", ""), ("finetune", "-arithmetic"), ("evaluate", "-arithmetic"))
    ]
    base, finetune = cells["pretrain-wd1"], cells["finetune-wd1-step2-arithmetic"]
    assert isinstance(finetune.config, FinetuneConfig)
    assert finetune.config.base == base.folder / "checkpoints/step-2"
    assert (finetune.parent, finetune.step) == (base.id, 2)
    identity = f"{base.folder.name.rsplit('-', 1)[1]}@2"
    assert finetune.folder.name.endswith(config_hash(finetune.config, base=identity))
    asked = cells["evaluate-wd1-step2"]
    assert asked.folder.name.endswith(config_hash(asked.config, model=identity))
    assert (asked.parent, asked.step, asked.task) == (base.id, 2, None)


def test_what_was_prepared_enters_the_hash_of_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descendants(small_study(tmp_path))
    task = SimpleNamespace(identity="ab" * 32)
    monkeypatch.setattr("megatron_plasticity.study.plan.get_task", lambda _: task)
    monkeypatch.setattr("megatron_plasticity.evaluation.tasks.registry.get_task", lambda _: task)
    after = descendants(small_study(tmp_path))
    changed = {id for id, cell in after.items() if cell.folder != before[id].folder}
    assert changed == {"evaluate-wd1", "finetune-wd1-arithmetic", "evaluate-wd1-arithmetic"}
    finetune, base = after["finetune-wd1-arithmetic"], after["pretrain-wd1"]
    inputs = {"base": base.folder.name.rsplit("-", 1)[1], "task": task.identity}
    assert finetune.folder.name.endswith(config_hash(finetune.config, **inputs))


def test_the_texts_of_probes_enter_the_hash_of_what_reads_them(tmp_path: Path) -> None:
    train, test = tmp_path / "train.tsv", tmp_path / "test.tsv"
    train.write_text("text\tlabel\ngood\t1\nbad\t0\n")
    own = {"name": "own", "train_files": [str(train)], "test_files": [str(test)], "labels": [0, 1]}
    study = small_study(tmp_path, {"analyses": {"probes": {"datasets": ["own"], "own_datasets": [own]}}})
    with pytest.raises(ConfigError, match=r"test\.tsv not found"):
        check_study(study, tasks_needed=False)

    test.write_text("text\tlabel\nfine\t1\n")
    before = descendants(study)
    test.write_text("text\tlabel\nawful\t0\n")
    after = descendants(study)
    assert {id for id, cell in after.items() if cell.folder != before[id].folder} == {"probes-wd1"}
    cell, base = after["probes-wd1"], after["pretrain-wd1"]
    assert isinstance(cell.config, ProbesConfig)
    inputs = {"model": base.folder.name.rsplit("-", 1)[1], **probe_inputs(cell.config)}
    assert cell.folder.name.endswith(config_hash(cell.config, **inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune_axes": {"optimizer.wd": [1]}}, r"optimizer\.wd: unknown key"),
        ({"finetune_axes": {"seed": []}}, r"axis 'seed' has no values"),
        ({"finetune_axes": {"seed": [1, 1]}}, r"axis 'seed' repeats a value"),
        (
            {"finetune_axes": {"optimizer.weight_decay": [1, 1.0]}},
            r"finetune_axes: two points of the grid are the same run: optimizer\.weight_decay=1 and optimizer\.weight_decay=1\.0",
        ),
        ({"finetune_axes": {"seed": [1, 2], "batch.micro_batch_size": [1, 8]}}, r"same run: batch\.micro_batch_size=1 and"),
        ({"finetune_axes": {"logging.every_steps": [1, 8]}}, r"same run: logging\.every_steps=1 and logging\.every_steps=8"),
        (
            {"finetune_axes": {"optimizer.adamw_timescale": [1, 2], "optimizer.weight_decay": [0, 0.1]}},
            r"finetune_axes: optimizer\.adamw_timescale and optimizer\.weight_decay are two ways to state one λ",
        ),
        ({"finetune": {"capture": {"points": ["nope"]}}}, r"finetune\.capture: no hook point matches 'nope'"),
        ({"finetune": {"capture": {"steps": [3]}}}, r"finetune on arithmetic: capture\.steps: \[3\] lie after the last step, 2"),
        ({"finetune": {"optimizer": {"decay": PATTERNS}}}, r"finetune\.optimizer\.decay\.patterns: 'nothing\.\*' matches no"),
        (
            {"finetune": {"lora": {}, "optimizer": {"decay": PATTERNS}}},
            r"finetune\.optimizer\.decay\.patterns: 'nothing\.\*' matches no parameter; names look like '.*lora_A",
        ),
        (
            {"finetune": {"batch": {"global_batch_size": 64}}},
            r"finetune on arithmetic: task\.train_examples: 16 usable examples times epochs=1 do not fill one batch",
        ),
        ({"finetune": {"engine": {"deepspeed": {"optimizer": {}}}}}, r"finetune\.engine\.deepspeed\.optimizer: decided by our"),
        ({"finetune": {"checkpoint": {"resume_from": "nowhere"}}}, r"finetune\.checkpoint\.resume_from: nowhere: no such"),
        ({"finetune_axes": {"batch.global_batch_size": [8, 12]}}, r"micro_batch_size=8 must divide global_batch_size=12"),
        ({"finetune_axes": {"max_length": [16, 1000]}}, r"finetune\.max_length=1000 exceeds the base model's context_length=160"),
        ({"finetune_axes": {"template": ["{prompt}"]}}, r"evaluate\.template differs"),
        ({"finetune_steps": [3]}, r"finetune_steps: 3: the base run writes checkpoints every 2 steps"),
        ({"finetune_steps": [6]}, r"finetune_steps: 6: .* the last of its 6 is fine-tuned anyway"),
        ({"finetune_steps": [2, 2]}, r"a step is named twice"),
        ({"finetune_steps": [2], "base": {"checkpoint": {"every_steps": None}}}, r"state base\.checkpoint\.every_steps"),
        ({"finetune_steps": [2], "tasks": []}, r"`finetune_steps` is about fine-tuning, and without `tasks`"),
    ],
)
def test_fine_tuning_that_cannot_work_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_study(small_study(tmp_path, changes))


def test_a_study_can_be_planned_before_its_tasks_are_prepared(tmp_path: Path) -> None:
    study = small_study(tmp_path, {"tasks": [{"name": "gsm8k", "folder": str(tmp_path)}]})
    assert len(check_study(study, tasks_needed=False)) == 2
    assert "tasks prepare gsm8k" in " ".join(task_problems(study))
    with pytest.raises(ConfigError, match="gsm8k"):
        plan_study(study, "h")
    with pytest.raises(ConfigError, match="gsm9k"):
        check_study(small_study(tmp_path, {"tasks": [{"name": "gsm9k"}]}), tasks_needed=False)


def test_the_sweep_of_the_paper(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["study", "plan", str(repository / "configs/studies/paper-finetune-sweep.yaml")])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "216 fine-tunings" in out
    assert "in 27 ways:" in out
    assert "batch.global_batch_size: 32, 64, 128" in out


def test_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="arithmetic"):
        check_study(small_study(tmp_path, {"tasks": [{"name": "arithmetics"}]}))
