"""The planner: what it proposes runs and fits, what it says is right, and bad input is one message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_plasticity.cli import main
from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.support import SUPPORT, unsupported
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.hardware import Hardware, Links
from megatron_plasticity.launch.plan import WIDTH, Layout, Machine, best_layouts, layouts, plan_page, reasons
from megatron_plasticity.models.sizes import flops_per_token
from tests.tools import load_tool

Load = Callable[..., PretrainConfig]


@pytest.fixture
def load(repository: Path) -> Load:
    """The paper's 4B run, with overrides."""

    def call(*overrides: str) -> PretrainConfig:
        return load_config(PretrainConfig, repository / "configs/runs/llama2-4b-20x.yaml", overrides)

    return call


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], repository: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs `plan` on the paper's 4B run."""

    def call(*arguments: str, config: str = "llama2-4b-20x") -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(repository / f"configs/runs/{config}.yaml"), *arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@pytest.mark.parametrize("gpus", [1, 6, 8, 32])
@pytest.mark.parametrize("overrides", [(), ("model.layers=60", "model.hidden_size=8192", "model.head_dim=256")])
def test_every_layout_is_supported_and_divides_the_batch(load: Load, gpus: int, overrides: tuple[str, ...]) -> None:
    config = load(*overrides)
    found = list(layouts(config, gpus))
    assert found
    for layout in found:
        assert not list(unsupported(layout.config, config.model))
        assert layout.data * layout.parallel.model_parallel_size == gpus
        rows = layout.data * layout.config.batch.micro_batch_size * layout.accumulation
        assert rows == config.batch.global_batch_size


@pytest.mark.parametrize(("gpus", "gibibytes"), [(8, 80.0), (8, 40.0), (8, 24.0), (32, 24.0)])
def test_the_override_gives_the_layout(load: Load, gpus: int, gibibytes: float) -> None:
    config, machine = load("parallel.pipeline=2", "parallel.layers_per_stage=[10,18]", "engine.zero_stage=0"), Machine(gibibytes)
    found = best_layouts(config, gpus, machine)
    assert found
    for layout in found:
        again = load("parallel.pipeline=2", "parallel.layers_per_stage=[10,18]", "engine.zero_stage=0", *_pairs(layout, config))
        assert Layout(again, gpus).settings == layout.settings
        assert Layout(again, gpus).gibibytes == pytest.approx(layout.gibibytes)
        assert layout.gibibytes <= machine.usable


def _pairs(layout: Layout, config: PretrainConfig) -> list[str]:
    return layout.overrides(config).split()


def test_the_override_undoes_what_is_adapted(load: Load) -> None:
    """fp32 at stage 0 runs as stage 1 with a pipeline, and as stage 0 without: the layout's stage must be said."""
    config = load("engine.precision=fp32", "engine.zero_stage=0", "parallel.pipeline=2")
    layout = Layout(config, 8).variant(pipeline=1)
    assert layout is not None
    assert layout.overrides(config) == "parallel.pipeline=1 engine.zero_stage=1"


def test_less_memory_costs_more(load: Load) -> None:
    """From a large micro-batch to a small one, to computing twice; and then nothing fits."""
    config = load()
    best = [best_layouts(config, 1, Machine(gibibytes)) for gibibytes in (140.0, 90.0, 82.0, 60.0)]
    micro_batches = [found[0].config.batch.micro_batch_size for found in best[:2]]
    assert micro_batches == [8, 1]
    assert [found[0].config.engine.activation_checkpointing for found in best[:3]] == [False, False, True]
    ranks = [found[0].rank for found in best[:3]]
    assert ranks == sorted(ranks)
    assert not best[3]


def test_a_larger_micro_batch_is_taken_while_it_fits(load: Load) -> None:
    config, machine = load(), Machine(80.0)
    for layout in best_layouts(config, 8, machine):
        twice = layout.variant(micro_batch_size=2 * layout.config.batch.micro_batch_size)
        assert twice is None or twice.gibibytes > machine.usable or int(twice.bubble / 0.05) > int(layout.bubble / 0.05)


def test_bubble(load: Load) -> None:
    """(p − 1)/(m + p − 1): 4 stages and 8 micro-batches idle for 3 of 11 slots."""
    layout = Layout(load("parallel.pipeline=4", "batch.global_batch_size=32"), 4)
    assert layout.accumulation == 8
    assert layout.bubble == pytest.approx(3 / 11)
    assert layout.work == pytest.approx(11 / 8)


def test_reasons_name_what_the_alternative_would_need(load: Load) -> None:
    machine = Machine(24.0)
    layout = best_layouts(load(), 8, machine)[0]
    lines = list(reasons(layout, machine))
    assert any("a GPU would need" in line for line in lines)
    assert len(lines) >= 5


def test_layouts_are_ranked_by_predicted_time(load: Load) -> None:
    """Up to times that lie too close together to tell; among those comes first what the order of preference puts first."""
    config, machine = load(), Machine(80.0, hardware=Hardware())
    found = best_layouts(config, 32, machine)
    times = [layout.step_seconds(machine) for layout in found]
    fitting = [layout for layout in layouts(config, 32) if layout.gibibytes <= machine.usable]
    shortest = min(layout.step_seconds(machine) for layout in fitting)
    equal = [place for place, seconds in enumerate(times) if seconds <= 1.05 * shortest]
    assert equal == list(range(len(equal)))
    assert [layout.rank for layout in found[: len(equal)]] == sorted(layout.rank for layout in found[: len(equal)])
    assert times[len(equal) :] == sorted(times[len(equal) :])
    assert best_layouts(config, 32, machine, count=1) == found[:1]
    for layout in found:
        alike = (layout.settings, {"micro_batch_size": 1})
        same = [other for other in fitting if other.settings | alike[1] == alike[0] | alike[1]]
        quickest = min(other.step_seconds(machine) for other in same)
        assert layout.step_seconds(machine) == quickest


def test_a_slow_network_changes_the_layout(load: Load) -> None:
    """Where weights cannot be gathered in time, ranks of a node share them, or they stay whole."""
    fast, slow = (Machine(80.0, hardware=Hardware(links=Links(network_gigabits=rate))) for rate in (400.0, 2.0))
    config = load("engine.zero_stage=3")
    best = best_layouts(config, 128, slow, count=1)[0]
    assert best.zero_stage < 3
    unchanged = Layout(config.model_copy(update={"batch": config.batch.model_copy(update={"micro_batch_size": 8})}), 128)
    assert best.step_seconds(slow) < unchanged.step_seconds(slow)
    assert unchanged.step_seconds(fast) < 0.5 * unchanged.step_seconds(slow)


def test_the_page_of_predicted_times(run: Any, load: Load) -> None:
    code, out, _ = run("--gpus", "8")
    assert code == 0
    assert "Times are PREDICTED" in out
    config = load()
    row = next(line.split() for line in out.splitlines() if line.startswith("config"))
    predicted = Layout(config, 8).predicted(Hardware()).total
    assert float(row[8]) == pytest.approx(predicted, rel=0.01)
    assert float(row[9].replace(",", "")) == pytest.approx(config.tokens_per_step / predicted, rel=1e-3)
    assert float(row[11].replace(",", "")) == pytest.approx(config.total_steps * predicted / 3600, rel=0.01)
    shares = next(line.split() for line in out.splitlines() if line.startswith("config") and "|" in line)[1:8]
    assert sum(float(share.rstrip("%")) for share in shares) == pytest.approx(100, abs=0.5)


def test_hardware_can_be_chosen(run: Any) -> None:
    def hours(*options: str) -> float:
        out = run("--gpus", "8", *options)[1]
        return float(next(line.split() for line in out.splitlines() if line.startswith("config"))[11].replace(",", ""))

    assert hours("--gpu", "h200") < hours() < hours("--gpu", "a100")
    assert hours("--gpus-per-node", "1", "--network", "10") > hours("--gpus-per-node", "1") > hours()


def test_assumptions_are_printed(run: Any) -> None:
    code, out, _ = run("--gpus", "1", "--gpu", "h200", "--network", "123", "--assumptions")
    assert code == 0
    for text in ("4.8 TB/s", "123 Gbit/s per GPU", "sustained_share", "source: NVIDIA's data sheet", "hook_seconds"):
        assert text in out
    assert max(len(line) for line in out.splitlines()) <= WIDTH


def test_the_tables_of_the_document_are_current(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For 8 GPUs; `tools/planning_tables.py --check` compares the other rows too, and takes longer."""
    tables = load_tool("planning_tables")
    shown = tables.DOCUMENT.read_text(encoding="utf-8")
    monkeypatch.setattr(tables, "GPUS", (8,))
    anew = tables.filled(shown).splitlines()
    assert len(anew) > 100
    assert [line for line in anew if line not in shown.splitlines()] == []
    for current, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(tables, "filled", lambda text, drift=("" if current else "drift"): text + drift)
        assert tables.main(["--check"]) == code
    assert "planning.md is not current" in capsys.readouterr().err


def test_the_page(run: Any, load: Load) -> None:
    code, out, _ = run("--gpus", "8", "32", "128", "--mfu", "0.4")
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= WIDTH
    for gpus in (8, 32, 128):
        assert f"\n{gpus} GPUs\n" in out
    config = load()
    flops = flops_per_token(config.model, 2048) * config.total_steps * config.tokens_per_step
    assert f"{flops:.3g} FLOPs" in out
    assert f"{flops / (989e12 * 0.4) / 3600:,.0f} GPU-hours" in out
    assert "ASSUMING" in out
    assert "48.0 GB on disk per checkpoint" in out
    for row in SUPPORT:
        assert row.combination.split(",")[0] in " ".join(out.split())


def test_the_assumed_mfu_changes_the_hours(run: Any) -> None:
    hours = [float(run("--mfu", mfu)[1].split(" GPU-hours")[0].split()[-1].replace(",", "")) for mfu in ("0.2", "0.4")]
    assert hours[0] == pytest.approx(2 * hours[1], rel=1e-3)


def test_stages_are_listed(run: Any) -> None:
    code, out, _ = run("--memory", "40")
    assert code == 0
    assert "stage 0: 0–13 + embedding" in out
    assert "stage 1: 14–27 + head" in out


def test_gpus_that_the_config_does_not_divide(run: Any) -> None:
    code, out, _ = run("--gpus", "12")
    assert code == 0
    assert "as configured: impossible: batch.global_batch_size=1024 cannot be split over 12 data-parallel ranks" in out
    assert "3×4×1" in out


def test_gpus_that_nothing_divides(run: Any) -> None:
    code, out, _ = run("--gpus", "31")
    assert code == 0
    assert (
        "no layout: batch.global_batch_size=1024 and the model's 28 layers cannot be split evenly over 31 GPUs; 30 would do"
        in " ".join(out.split())
    )


def test_too_little_memory(run: Any) -> None:
    code, out, _ = run("--gpus", "1", "--memory", "40")
    assert code == 0
    assert "DOES NOT FIT" in out
    assert "no layout fits: the one that needs least" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0"), "--gpus 0: a number of GPUs is at least 1"),
        (("--memory", "-3"), "--memory -3: one GPU's memory in GiB"),
        (("--memory", "nan"), "--memory nan"),
        (("--mfu", "2"), "--mfu 2: a share of the GPU's peak"),
        (("--gpu", "v100"), "--gpu v100: not known; choose one of h100, h200, a100"),
        (("--gpus-per-node", "0"), "--gpus-per-node 0: a node has at least one GPU"),
        (("--network", "-1"), "--network -1: gigabits per second"),
        (("--mfu", "0.4", "--assumptions"), "--assumptions: with --mfu nothing is predicted"),
        (("model.layers=0",), "model.layers"),
    ],
)
def test_bad_input_is_one_message(run: Any, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) <= 2
    assert not out


def test_an_unknown_file(run: Any) -> None:
    code, _, err = run(config="llama2-4b-20")
    assert code == 2
    assert "did you mean" in err


def test_every_shipped_run_can_be_planned(repository: Path) -> None:
    for path in sorted((repository / "configs/runs").glob("*.yaml")):
        page = plan_page(load_config(PretrainConfig, path), [1, 8], Machine(hardware=Hardware()))
        assert max(len(line) for line in page.splitlines()) <= WIDTH


def test_no_number_of_gpus_is_an_error(load: Load) -> None:
    with pytest.raises(UserError, match="at least 1"):
        plan_page(load(), [8, -1], Machine())
