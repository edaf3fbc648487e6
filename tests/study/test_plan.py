"""From a grid to a graph of runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_plasticity.config.training import FinetuneConfig, PretrainConfig
from megatron_plasticity.errors import ConfigError, UserError
from megatron_plasticity.study.plan import check_study, plan_study
from tests.study.small import small_study


def test_each_base_model_gets_its_descendants(tmp_path: Path) -> None:
    plan = plan_study(small_study(tmp_path), "corpus-hash")
    assert [cell.id for cell in plan.cells if cell.weight_decay == 1.0] == [
        "pretrain-wd1",
        "probes-wd1",
        "attention-wd1",
        "overfitting-wd1",
        "evaluate-wd1",
        "finetune-wd1-arithmetic",
        "evaluate-wd1-arithmetic",
    ]
    parents = {cell.id: cell.parent for cell in plan.cells}
    assert parents["evaluate-wd1-arithmetic"] == "finetune-wd1-arithmetic"
    assert parents["finetune-wd1-arithmetic"] == "pretrain-wd1"
    assert parents["pretrain-wd1"] is None
    assert len({cell.folder for cell in plan.cells}) == len(plan.cells) == 14


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
        ({"finetune": {"max_length": 1000}}, r"finetune\.max_length=1000 exceeds base\.model\.context_length=160"),
        ({"evaluate": {"template": "{prompt}"}}, r"evaluate\.template differs"),
        ({"axes": {"optimizer.weight_decay": [0.1, "0.1"]}}, r"two points of the grid are the same"),
    ],
)
def test_a_study_that_cannot_work_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_study(small_study(tmp_path, changes))


def test_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="arithmetic"):
        check_study(small_study(tmp_path, {"tasks": [{"name": "arithmetics"}]}))
