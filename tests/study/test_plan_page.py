"""What `study plan` says a study needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.config.tasks import TaskConfig
from megatron_plasticity.data.stream import corpus_hash
from megatron_plasticity.launch.plan import Machine
from megatron_plasticity.models.sizes import flops_per_token, parameter_count
from megatron_plasticity.study.check import check_study
from megatron_plasticity.study.cost import SAMPLING, Costs
from megatron_plasticity.study.plan import plan_study
from megatron_plasticity.study.task_sizes import TaskSize, task_size
from megatron_plasticity.tracking.run_folder import RunFolder
from tests.commands import Run
from tests.study.machines import counting_study
from tests.study.small import small_tree

STUDIES = sorted((Path(__file__).resolve().parents[2] / "configs/studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_can_be_planned(run: Run, path: Path) -> None:
    code, out, err = run("study", "plan", path)
    assert code == 0, err
    assert "What needs what" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("before")) <= 110


def test_planning_needs_no_torch(repository: Path) -> None:
    """So that it is quick: torch alone takes a second and more to import."""
    script = (
        "import sys\nfrom megatron_plasticity.cli import main\n"
        "try:\n    main(['study', 'plan', 'configs/studies/quickstart.yaml'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines()[-1] == "False", ended.stderr


def test_the_graph_and_what_is_done(run: Run, tmp_path: Path, tiny_corpus: Path) -> None:
    config = counting_study(tmp_path, tiny_corpus)
    tree = small_tree(tmp_path, {"corpus": None, "base": {"data": {"folder": str(tiny_corpus)}}})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    code, out, err = run("study", "plan", tmp_path / "study.yaml")
    assert code == 0, err
    graph = out.split("What needs what\n")[1].split("\n\n")[0]
    assert graph.splitlines() == [
        "  pretrain 2",
        *(f"    {kind} 2" for kind in ("probes", "attention", "overfitting", "features", "truncation", "evaluate", "finetune")),
        "      evaluate 2",
    ]
    assert "0 of 18 runs are done" in out
    cell = plan_study(config, corpus_hash(check_study(config)[0].data)).cells[0]
    folder = RunFolder.create(cell.folder.parent, cell.kind, cell.name, cell.config, cell.inputs)
    folder.mark_running()
    folder.mark_done({})
    code, out, _ = run("study", "plan", tmp_path / "study.yaml")
    assert "1 of 18 runs are done" in out


def test_what_has_to_be_there_first(run: Run, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(small_tree(tmp_path)))
    code, out, _ = run("study", "plan", tmp_path / "study.yaml")
    assert code == 0
    assert "before it can run: the corpus is not prepared; `study run` prepares it" in out
    assert "runs are done" not in out


def test_costs(repository: Path) -> None:
    config = load_config(StudyConfig, repository / "configs/studies/paper-llama2-0.5b.yaml")
    plan = plan_study(config, "", tasks_needed=False)
    costs = Costs(plan, Machine(mfu=0.5), here=False)
    cells = {cell.id: cell for cell in plan.cells}
    base = cells["pretrain-wd1"].config
    model = base.model  # type: ignore[attr-defined]
    tokens = base.total_steps * base.tokens_per_step  # type: ignore[attr-defined]
    cost = costs.of_one(cells["pretrain-wd1"])
    flops = flops_per_token(model, 2048) * tokens
    assert (cost.tokens, cost.flops) == (tokens, pytest.approx(flops))
    assert cost.gpu_hours == pytest.approx(flops / (0.5 * 989e12) / 3600)
    assert cost.disk == 10 * 12 * parameter_count(model).total, (
        "a checkpoint of weights and two moments every 1,000 of 9,537 steps"
    )
    tuned = costs.of_one(cells["finetune-wd1-metamathqa"])
    assert tuned.tokens == 395_000 * 3 // 64 * 64 * 2048
    assert tuned.flops == pytest.approx(flops_per_token(model, 2048) * tuned.tokens)
    asked = costs.of_one(cells["evaluate-wd1-metamathqa"])
    assert asked.tokens == (1209 + 5000) * 17 * 2048
    assert asked.flops == pytest.approx(flops_per_token(model, 2048) / 3 * asked.tokens)
    assert asked.gpu_hours == pytest.approx((asked.flops or 0) / (0.5 * SAMPLING * 989e12) / 3600)
    assert costs.of_one(cells["probes-wd1"]).gpu_hours == 0
    assert costs.of(plan.cells).gpu_hours is not None


def test_what_is_not_known_is_said(repository: Path) -> None:
    config = load_config(StudyConfig, repository / "configs/studies/paper-finetune-sweep.yaml")
    plan = plan_study(config, sources={}, tasks_needed=False)
    cost = Costs(plan, Machine(), here=False).of(plan.cells)
    assert cost.tokens is not None
    assert (cost.flops, cost.gpu_hours, cost.disk) == (None, None, None)


def test_sizes_of_tasks(tmp_path: Path) -> None:
    def size(name: str, train: int | None, test: int | None, folder: Path = tmp_path) -> TaskSize:
        return task_size(TaskConfig(name=name, train_examples=train, test_examples=test, folder=folder))

    assert size("arithmetic", 30, 7) == TaskSize(30, 7)
    assert size("metamathqa", None, None) == TaskSize(395_000, 1209 + 5000), "as its file says"
    assert size("metamathqa", 10**9, 1300) == TaskSize(395_000, 1209 + 1300), "asked for per test set, and no more than there are"
    assert size("own", 10, 20) == TaskSize(10, None)


def test_a_model_that_does_not_fit_is_refused(run: Run, repository: Path) -> None:
    study = repository / "configs/studies/paper-llama2-4b.yaml"
    code, _, err = run("study", "plan", study, "--memory", "24", "resources.retries=x")
    assert code == 2
    assert "resources.retries" in err
    code, _, err = run("study", "plan", study, "--memory", "24")
    assert code == 2
    assert "base: does not fit: on 8 GPUs one needs" in err
    assert "finetune: does not fit" in err
    assert err.count("base: does not fit") == 1, "the points of the grid share it"
    code, _, _ = run("study", "plan", study, "--memory", "141")
    assert code == 0


def test_machines_are_part_of_the_plan(run: Run, repository: Path, tmp_path: Path) -> None:
    study = repository / "configs/studies/paper-llama2-0.5b.yaml"
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    code, out, _ = run("study", "plan", study, "--hostfile", tmp_path / "hosts", "resources.slots=2")
    assert code == 0
    assert "Runs of 8 ranks each on 2 places of 2 machines: a:0-7, b:0-7" in out
    both = ("resources.slots=3", "resources.processes_per_run=12")
    code, _, err = run("study", "plan", study, "--hostfile", tmp_path / "hosts", *both)
    assert code == 2
    assert "no place for a run of resources.processes_per_run=12" in err
    assert "cannot be split over 12" in err, "all problems at once"
    code, _, err = run("study", "plan", study, "--hostfile", tmp_path / "hosts", "resources.slots=3")
    assert "resources.slots=3" in err
    code, out, _ = run("study", "plan", study, "--slurm", "resources.slurm.gpus_per_node=8")
    assert "as array jobs of Slurm, 1 at once, up to 24:00:00 at a time" in out
