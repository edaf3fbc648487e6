"""What enters the hash of an evaluation beside its settings and the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_plasticity.config.evaluation import EvaluateRecipe
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.evaluation import inputs
from megatron_plasticity.evaluation.inputs import evaluation_inputs

ARITHMETIC = (TaskConfig(name="arithmetic"),)


def test_of_procedural_tasks_nothing_but_code_decides() -> None:
    assert evaluation_inputs(EvaluateRecipe(), ARITHMETIC) == {}


def test_the_library_that_grades_enters_where_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = EvaluateRecipe(paper_compat=True)
    with_library = evaluation_inputs(strict, ARITHMETIC)["grader"]
    monkeypatch.setattr(inputs, "math_verify_installed", lambda: False)
    assert evaluation_inputs(strict, ARITHMETIC) == {"grader": "exact-number"} != {"grader": with_library}
    monkeypatch.setattr(inputs, "get_task", lambda _: SimpleNamespace(answer_kinds={"maths"}))
    assert evaluation_inputs(EvaluateRecipe(), ARITHMETIC) == {"grader": "exact-number"}


def test_the_files_of_a_reward_model_enter(tmp_path: Path) -> None:
    recipe = EvaluateRecipe.model_validate({"reward": {"kind": "sequence_classifier", "model": str(tmp_path)}})
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = evaluation_inputs(recipe, ARITHMETIC)
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert set(before) == {"reward"}
    assert evaluation_inputs(recipe, ARITHMETIC) != before
    on_the_hub = EvaluateRecipe.model_validate({"reward": {"kind": "sequence_classifier", "model": "owner/name"}})
    assert evaluation_inputs(on_the_hub, ARITHMETIC) == {}
