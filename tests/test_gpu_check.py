"""The check of a GPU, on a CPU: it runs to its end, what needs CUDA never passes for checked, and faults are seen."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_plasticity.launch.doctor import examine
from tests.launch.fabricated_machines import h100_node
from tests.tools import TOOLS, load_tool

gpu_check = load_tool("gpu_check")
arithmetic, attention, machine_of, runs, steps = (
    importlib.import_module(f"gpu_checks.{name}") for name in ("arithmetic", "attention", "machine", "runs", "steps")
)

# Parts of the names of rows that a machine without CUDA cannot tell.
OF_CUDA = (
    "versions",
    "packages of kernels",
    "flash-attention",
    "sdpa-cudnn",
    "sdpa-efficient",
    "training takes",
    "compiled blocks",
    "memory",
    "apex",
    "DeepSpeed",
    "NCCL",
    "two ranks",
    "speed",
    "host waits",
    "train_gpu",
    "tools/bench",
)


def test_the_command_rehearses_some_sections(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    sections = ["attention", "loss"]
    ended = subprocess.run(
        [sys.executable, str(TOOLS / "gpu_check.py"), "--rehearse", "--only", *sections, "--json", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "This was a rehearsal: it says nothing about any GPU." in ended.stdout
    rows = json.loads(path.read_text())["rows"]
    assert {row["section"] for row in rows} == set(sections)
    assert {row["verdict"] for row in rows} == {"ok", "needs CUDA"}


@pytest.mark.full
@pytest.mark.distributed
def test_a_rehearsal_runs_every_section_and_claims_nothing_of_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    ended = subprocess.run(
        [sys.executable, str(TOOLS / "gpu_check.py"), "--rehearse", "--json", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "This was a rehearsal: it says nothing about any GPU." in ended.stdout
    document = json.loads(path.read_text())
    assert document["rehearsal"] is True
    rows = document["rows"]
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(gpu_check.SECTIONS)
    assert {row["verdict"] for row in rows} == {"ok", "needs CUDA"}
    for row in rows:
        if row["check"] == "AdamW, DeepSpeed":  # its kernel for CPUs may have been built here before
            continue
        about_cuda = any(part in row["check"] for part in OF_CUDA) and not row["check"].endswith(": rows")
        assert (row["verdict"] == "needs CUDA") == (about_cuda or row["check"].startswith("tip")), row
    measured = {row["check"]: row["measured"] for row in rows}
    assert measured["NCCL, one process"] == "six collectives give what they should (gloo)"
    assert "gradient norm" in measured["two ranks on one GPU over gloo, tensor 2"]
    assert "checkpoints step-3, step-6" in measured["a stopped run goes on bit for bit"]
    assert "0 in a micro-step" in measured["llama2-debug: host waits for the GPU"]
    assert measured["train_gpu, llama2-debug, ours"].startswith("measured: ")
    assert len([row for row in rows if row["check"].startswith("a step, ")]) == 9


# --- A section that fails costs its own rows alone.


def a_crash(name: str, rehearse: bool, writer: Connection) -> None:
    writer.send(machine_of.Row("before the crash", "", "", "ok"))
    os.kill(os.getpid(), signal.SIGSEGV)


def an_exception(name: str, rehearse: bool, writer: Connection) -> None:
    raise RuntimeError("the kernel is not there")


def a_hang(name: str, rehearse: bool, writer: Connection) -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("work", "seconds", "said"),
    [
        (a_crash, 60, "ended by SIGSEGV"),
        (an_exception, 60, "ended with exit code 1: RuntimeError: the kernel is not there"),
        (a_hang, 8, "took longer than 8 s and was stopped"),
    ],
)
def test_a_section_that_does_not_end_well_is_a_failed_row(work: Any, seconds: float, said: str) -> None:
    rows = [timed.row for timed in gpu_check.run_section("loss", True, seconds, work)]
    assert rows[-1].verdict == "FAILED"
    assert rows[-1].measured.startswith(said)
    assert [row.check for row in rows[:-1]] == (["before the crash"] if work is a_crash else [])


def test_a_section_without_time_left_has_failed() -> None:
    assert [timed.row.verdict for timed in gpu_check.run_section("loss", True, 0)] == ["FAILED"]


def test_a_failed_row_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(name: str, *_: Any) -> Iterator[Any]:
        yield gpu_check.Timed(name, 1.0, machine_of.Row(name, "0.5", "0.1", "FAILED" if name == "loss" else "ok"))
        return 2.0

    monkeypatch.setattr(gpu_check, "run_section", fails)
    assert gpu_check.main(["--rehearse", "--only", "loss", "ranks"]) == 1
    assert "1 FAILED, 1 ok" in capsys.readouterr().out
    assert gpu_check.main(["--rehearse", "--only", "ranks"]) == 0
    assert "2 s of processor time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--rehearse", "--minutes", "0"], "--minutes 0: must be above 0"),
        (["--rehearse", "--json", "no/such/folder/file"], "there is no folder"),
        ([], "torch sees no CUDA device"),
    ],
)
def test_bad_input_ends_before_anything_runs(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_with_a_gpu_there_is_nothing_against_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_check._no_gpu() is None


def test_long_texts_are_wrapped_and_all_limits_fit_the_promise() -> None:
    lines = gpu_check._line("attention", "word " * 40, "1e-2", "ok").splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) < 140
    assert lines[0].endswith("ok")
    assert set(gpu_check.LIMITS) == set(gpu_check.SECTIONS)


# --- Faults are seen.


def rows_of(section: str) -> dict[str, Any]:
    return {row.check: row for row in gpu_check.SECTIONS[section](machine_of.Rehearsal())}


def test_nan_and_too_much_fail_on_any_machine() -> None:
    for machine in (machine_of.Gpu(), machine_of.Rehearsal()):
        verdicts = [machine.row("check", "", value, 1.0).verdict for value in (0.5, 1.0, 1.5, float("nan"))]
        assert verdicts == ["ok", "ok", "FAILED", "FAILED"]
    assert machine_of.Rehearsal().row("check", "", 0.5, 1.0, needs_cuda=True).verdict == "needs CUDA"
    assert machine_of.Gpu().row("check", "", 0.5, 1.0, needs_cuda=True).verdict == "ok"
    assert machine_of.Gpu().missing("check", "why").verdict == "not here"
    assert machine_of.Gpu().noted("check", "figure").verdict == "noted"


class _OneNan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        wrong = gradients[0].clone()
        wrong[0, 0, 0, 0] = float("nan")
        return wrong


def test_a_wrong_kernel_and_a_nan_gradient_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_of.Rehearsal, "more_heads", {})
    right = attention.attend

    def wrong(query: Tensor, key: Tensor, value: Tensor, mask: Any, backend: str) -> Tensor:
        if backend == "sdpa-flash":
            value = _OneNan.apply(value)
        output = right(query, key, value, mask, backend)
        return output * 1.02 if backend == "sdpa-math" and query.shape[-1] == 80 else output

    monkeypatch.setattr(attention, "attend", wrong)
    rows = rows_of("attention")
    for precision in ("fp32", "bf16"):
        assert rows[f"attention, sdpa-flash, {precision}"].verdict == "FAILED"
        assert "backward nan" in rows[f"attention, sdpa-flash, {precision}"].measured
        assert rows[f"attention, sdpa-math, {precision}"].verdict == "FAILED"
        assert "head dim 80" in rows[f"attention, sdpa-math, {precision}"].measured
        assert rows[f"attention, eager, {precision}"].verdict == "ok"
    assert rows["packed texts, sdpa-flash, bf16"].verdict == "FAILED"


def test_attention_that_is_slow_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = types.SimpleNamespace(kernel="math kernel of torch (sdpa)", slow="all scores are written to memory")
    monkeypatch.setattr(attention, "choose_attention", lambda *_: choice)
    first = next(attention.attention(machine_of.Gpu()))
    assert (first.verdict, first.measured) == ("SLOW", "all scores are written to memory")


def test_a_wrong_gradient_of_the_loss_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = arithmetic.linear_cross_entropy

    def wrong(hidden: Tensor, weight: Tensor, targets: Tensor, **how: Any) -> Any:
        return right(hidden, weight, targets, **{**how, "z_loss_weight": 0.0})

    monkeypatch.setattr(arithmetic, "linear_cross_entropy", wrong)
    rows = rows_of("loss")
    assert rows["loss, fp32"].verdict == "FAILED"


def test_an_adamw_with_coupled_decay_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops.adam

    def coupled(groups: Any, adamw_mode: bool, bias_correction: bool, **settings: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, **settings)

    monkeypatch.setattr(arithmetic, "ops", lambda: types.SimpleNamespace(prebuilt=("cpu_adam",), in_folder=()))
    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", coupled)
    rows = rows_of("optimizers")
    assert rows["AdamW, DeepSpeed"].verdict == "FAILED"
    assert rows["AdamW, torch, fused"].verdict == "ok"
    assert "apex" in rows["AdamW, NVIDIA apex"].measured


def test_a_step_that_is_off_is_caught() -> None:
    machine = machine_of.Rehearsal()
    loss, norm = steps.exact_step(machine, "fp32", 4)
    verdicts = [
        steps.step_row(machine, "a step", "fp32", [(loss, norm), step], 4).verdict
        for step in ((loss, norm), (loss * 1.0001, norm), (loss, norm * 1.001), (float("nan"), norm))
    ]
    assert verdicts == ["ok", "FAILED", "FAILED", "FAILED"]


def test_a_rank_that_gloo_refuses_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(steps, "_rank", a_refusal)
    with capsys.disabled():  # the rank inherits where errors go
        said = steps._on_two_ranks(machine_of.Rehearsal(), {"tensor": 2})
    assert said == "gloo does not take it: RuntimeError: ProcessGroupGloo::send: invalid tensor type (must be a CPU tensor)"


def a_refusal(kind: Any, layout: dict[str, int], writer: Any) -> None:
    raise RuntimeError("ProcessGroupGloo::send: invalid tensor type (must be a CPU tensor)")


def test_a_bench_that_writes_nothing_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_bench", lambda *_: runs.Ended(1, "", "out of memory"))
    row = next(runs._train_gpu(machine_of.Gpu()))
    assert (row.verdict, row.measured) == ("FAILED", "exit code 1: out of memory")


@pytest.mark.parametrize(
    ("ended", "on_cpu", "on_gpu"),
    [
        ((0, "ratio 2, as wanted", ""), "needs CUDA", "ok"),
        ((1, "ratio 0.5, NOT AS WANTED", ""), "needs CUDA", "FAILED"),
        ((1, "ratio 2, INVALID", ""), "FAILED", "FAILED"),
        ((1, "", "RuntimeError: no"), "FAILED", "FAILED"),
        ((-11, "ratio 2, as wanted", ""), "FAILED", "FAILED"),
        ((21, "", "scikit-learn is not here"), "not here", "not here"),
    ],
)
def test_a_bench_that_crashed_fails_on_any_machine(ended: Any, on_cpu: str, on_gpu: str) -> None:
    machines = (machine_of.Rehearsal(), machine_of.Gpu())
    assert [runs._probes(machine, runs.Ended(*ended)).verdict for machine in machines] == [on_cpu, on_gpu]


def test_training_that_was_not_measured_or_is_invalid_fails_on_any_machine() -> None:
    def verdicts(code: int, status: str, met: bool, reason: str = "") -> list[str]:
        row = {"name": "ours", "status": status, "reason": reason, "mfu": None, "tokens_per_second": 9.0}
        verdict = {"what": "rows", "found": "", "wanted": "", "met": met}
        document = {"ok": met, "models": [{"model": "m", "rows": [row], "verdicts": [verdict]}]}
        return [row.verdict for row in runs._train_gpu_rows(machine_of.Rehearsal(), runs.Ended(code, "", ""), document)]

    assert verdicts(0, "measured", True) == ["needs CUDA", "ok"]
    assert verdicts(1, "INVALID", False) == ["FAILED", "FAILED", "FAILED"]
    assert verdicts(1, "not measured", False, "failed: a crash") == ["FAILED", "FAILED", "FAILED"]
    assert verdicts(1, "measured", True) == ["FAILED"]  # it crashed after it had written
    assert verdicts(-9, "measured", True) == ["FAILED"]


def test_probes_without_scikit_learn_say_so() -> None:
    code = (
        "import runpy, sys; sys.modules['sklearn'] = None; sys.argv = ['probes.py']; "
        f"sys.path.insert(0, {str(TOOLS / 'bench')!r}); runpy.run_path({str(TOOLS / 'bench/probes.py')!r}, run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 21, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("scikit-learn, with which this compares, cannot be used here")


def a_session_of_its_own(name: str, rehearse: bool, writer: Connection) -> None:
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    writer.send(machine_of.Row("child", str(child.pid), "", "ok"))
    time.sleep(60)


def test_a_section_that_is_stopped_leaves_no_process() -> None:
    rows = [timed.row for timed in gpu_check.run_section("loss", True, 10, a_session_of_its_own)]
    assert [row.check for row in rows] == ["child", "loss"]
    assert not Path(f"/proc/{rows[0].measured}/cmdline").exists() or not Path(f"/proc/{rows[0].measured}/cmdline").read_bytes()


def test_the_loss_is_checked_over_pieces_and_may_not_hold_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_plasticity.models.loss as loss_module

    gpu = machine_of.Gpu()
    for machine, device in ((gpu, "cuda"), (machine_of.Rehearsal(), "cpu")):
        assert machine.loss_shape[0] > loss_module._ROWS_AT_ONCE[device]
    tokens, width, vocabulary = gpu.loss_shape
    least_with_all_logits = 2 * (tokens * vocabulary + tokens * width + vocabulary * width)
    assert 1.05 * arithmetic.planned_for_loss(gpu, "bf16") < least_with_all_logits
    monkeypatch.setattr(loss_module, "_with_product", lambda total, a, b, is_only: a @ b)  # the last piece alone
    assert rows_of("loss")["loss, bf16"].verdict == "FAILED"


def test_why_there_is_no_deepspeed_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = types.SimpleNamespace(prebuilt=(), in_folder=())
    monkeypatch.setattr(arithmetic, "ops", lambda: nothing)
    assert "a rehearsal does not take" in arithmetic._not_to_be_had(machine_of.Rehearsal())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for nvcc, says in ((None, "there is no nvcc"), ("12.4", "nvcc is of CUDA 12.4, torch of CUDA 13.0"), ("13.1", None)):
        tools = types.SimpleNamespace(cxx="g++", ninja="1.13", nvcc=nvcc)
        monkeypatch.setattr(arithmetic, "compilers", lambda tools=tools: tools)
        reason = arithmetic._not_to_be_had(machine_of.Gpu())
        assert reason is None if says is None else says in reason


# --- What touches CUDA, with CUDA made up.


def test_the_environment_is_what_doctor_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "examine", h100_node)
    rows = {row.check: row for row in runs.environment(machine_of.Gpu())}
    assert rows["GPU"].measured == "NVIDIA H100 80GB HBM3, 80 GiB, sm 90"
    assert rows["doctor"].verdict == "ok"
    broken = replace(h100_node(), torch=None)
    monkeypatch.setattr(examine, "examine", lambda: broken)
    assert {row.check: row.verdict for row in runs.environment(machine_of.Gpu())}["doctor"] == "FAILED"


def test_micro_batches_tell_when_they_are_taken() -> None:
    taken: list[str] = []
    watched = iter(runs._Watched(["a", "b"], lambda: taken.append("taken")))
    assert taken == []
    assert (next(watched), taken) == ("a", ["taken"])
    assert (next(watched), taken) == ("b", ["taken", "taken"])


def test_the_gpu_is_asked_by_these_functions_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for name, answer in {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 3,
        "max_memory_allocated": 7,
        "get_device_name": "NVIDIA H200",
        "set_sync_debug_mode": None,
    }.items():
        assert callable(getattr(torch.cuda, name)), f"torch {torch.__version__} has no torch.cuda.{name}"
        monkeypatch.setattr(torch.cuda, name, lambda *given, name=name, answer=answer: calls.append((name, *given)) or answer)
    machine = machine_of.Gpu()
    machine.synchronize()
    machine.forget_peak()
    assert (machine.in_use(), machine.peak()) == (3, 7)
    with pytest.raises(ZeroDivisionError), machine.host_waits() as said:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        raise ZeroDivisionError
    assert [machine_of.is_wait(warning) for warning in said] == [True, True, False]
    assert [call for call in calls if call[0] == "set_sync_debug_mode"] == [
        ("set_sync_debug_mode", "warn"),
        ("set_sync_debug_mode", "default"),
    ]
    config = runs.load_config(runs.ModelConfig, machine_of.ROOT / "configs/models/llama2-0.5b.yaml")
    assert runs._mfu(machine, config, 120_000) == ", MFU 42.0% of 989 TFLOP/s"
