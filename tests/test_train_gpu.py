"""The GPU training bench: what its rows are made to say, how candidates are started, and a rehearsal on a CPU."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.model import ModelConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.initialisation import initialise
from megatron_plasticity.models.transformer import Transformer
from tests.tools import TOOLS, load_tool

# The scripts import one another, as they can when one of them is started.
sys.path.insert(0, str(TOOLS / "bench"))
bench = load_tool("bench/train_gpu")
FRESH = 10.57


def row(name: str, rate: float = 1000.0, **values: Any) -> Any:
    losses = values.pop("losses", [FRESH, 9.0])
    return bench.Row(name, "measured", tokens_per_second=rate, losses=losses, micro_batch=8, wanted_micro_batch=8, **values)


def by_name(verdicts: list[Any]) -> dict[str, Any]:
    return {verdict.what.split(",")[0]: verdict for verdict in verdicts}


# --- Validity.


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([10.37, 9.0], "first loss"),  # ln V: logits of another variance than our weights give
        ([FRESH, 9.051], "last loss"),
        ([FRESH, math.nan], "not finite"),
        ([FRESH, 10.55], "last loss"),
    ],
)
def test_rows_that_train_something_else_are_invalid(losses: list[float], reason: str) -> None:
    judged = bench.judged([row("ours"), row("litgpt", losses=losses)], FRESH, "bf16")
    assert [one.status for one in judged] == ["measured", "INVALID"]
    assert reason in judged[1].reason
    assert "INVALID" in bench.line_of(judged[1])


def test_losses_within_the_tolerance_are_valid_and_fp32_is_stricter() -> None:
    rows = [row("ours"), row("litgpt", losses=[FRESH + 0.04, 9.04])]
    assert [one.status for one in bench.judged(rows, FRESH, "bf16")] == ["measured", "measured"]
    assert [one.status for one in bench.judged(rows, FRESH, "fp32")] == ["measured", "INVALID"]


def test_losses_that_did_not_fall_compare_nothing() -> None:
    judged = bench.judged([row("ours", losses=[FRESH, 10.56]), row("litgpt", losses=[FRESH, 10.56])], FRESH, "bf16")
    assert {one.status for one in judged} == {"INVALID"}
    assert "did not fall" in judged[1].reason


def test_nothing_is_valid_without_ours() -> None:
    absent = bench.Row("ours", "not measured", "failed")
    judged = bench.judged([absent, row("litgpt")], FRESH, "bf16")
    assert [one.status for one in judged] == ["not measured", "INVALID"]
    (verdict,) = bench.verdicts(judged, bench.GOALS["llama2-1b"])
    assert not verdict.met


# --- Verdicts.


def test_verdicts_compare_with_the_best_valid_peer() -> None:
    rows = [
        row("ours", 1200.0, mfu=0.48, peak_bytes=1.04e9, planned_bytes=1e9),
        row("plain", 1180.0),
        row("litgpt", 1000.0),
        row("transformers", 1050.0),
        replace(row("olmo-core", 5000.0), status="INVALID"),
        bench.Row("transformers-liger", "not measured", "liger_kernel is not installed"),
        row(bench.AGAIN, 1100.0),
    ]
    found = by_name(bench.verdicts(rows, bench.GOALS["llama2-1b"]))
    assert not found["rows"].met
    assert "olmo-core" in found["rows"].found
    # Ours is the mean of first and last: 1150.
    assert found["MFU"].found == "46.0%"
    assert not found["MFU"].met
    ratio = found["tokens/s over those of the best of the others"]
    assert ratio.what.endswith("transformers")
    assert (ratio.found, ratio.met) == ("1.10", False)  # 1.095
    assert found["what the engine costs"].found == "2.5%"
    assert not found["what the engine costs"].met
    assert found["peak memory over that of plan"].met


def test_verdicts_are_met() -> None:
    rows = [row("ours", 1200.0, mfu=0.48, peak_bytes=0.96e9, planned_bytes=1e9), row("plain", 1210.0), row("litgpt", 1000.0)]
    found = bench.verdicts(rows, bench.GOALS["llama2-1b"])
    assert len(found) == 5
    assert all(verdict.met for verdict in found)
    assert not by_name(bench.verdicts([replace(rows[0], peak_bytes=1.06e9)], None))["peak memory over that of plan"].met


def test_there_is_no_target_for_another_gpu_and_no_ratio_without_peers() -> None:
    found = by_name(bench.verdicts([row("ours", mfu=0.1)], None))
    assert set(found) == {"rows"}
    assert any("no other trainer" in remark for remark in bench.remarks([row("ours")]))


def test_drift_is_told() -> None:
    (drift, *_) = bench.remarks([row("ours", 1000.0), row(bench.AGAIN, 950.0)])
    assert "-5.0%" in drift
    assert "TOO MUCH" in drift


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L40S", None),
    ],
)
def test_peak_of_a_gpu(name: str, peak: float | None) -> None:
    assert bench.peak_flops(name, "bf16") == peak


# --- Starting candidates.


def plan_with(tmp_path: Path, script: str = "exit 0", **changes: Any) -> Any:
    """A rehearsal in which litgpt's interpreter is a shell script."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return replace(plan_of(["--rehearse", "--model", "llama2-debug", "--python", f"litgpt={python}"]), **changes)


def plan_of(arguments: list[str]) -> Any:
    """What a command line comes to, without running it."""
    taken: list[Any] = []

    def take(name: str, plan: Any) -> dict[str, Any]:
        taken.append(plan)
        return {"ok": True}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "report", take)
        assert bench.main(arguments) == 0
    return taken[0]


def setting_of(plan: Any, micro_batch: int = 4) -> Any:
    model = plan.models["llama2-debug"]
    return bench.Setting(model.model_dump(mode="json"), "cpu", "bf16", micro_batch, 2 * micro_batch, 1, 1, 1e-3, "weights", 0.1)


MACHINE = {"device": "NVIDIA H200", "square_flops": 800e12}


def test_half_the_micro_batch_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = plan_with(tmp_path)
    tried = []

    def start(what: str, setting: Any, plan: Any, folder: Path) -> dict[str, Any]:
        tried.append(setting.micro_batch)
        assert setting.batch == 64  # the sequences of a step stay the same
        if setting.micro_batch > 8:
            raise bench.OutOfMemory
        return {"losses": [FRESH, 9.0], "seconds": [9.0, 2.0], "peak_bytes": 5, "remark": "", "versions": {}}

    monkeypatch.setattr(bench, "start", start)
    found = bench.measured("ours", setting_of(plan, 32), plan, tmp_path, MACHINE)
    assert tried == [32, 16, 8]
    assert found.tokens_per_second == 64 * 128 / 2.0
    assert (found.micro_batch, found.wanted_micro_batch) == (8, 32)
    assert "out of memory with 32" in bench.line_of(found)
    assert found.planned_bytes == bench.planned_bytes(replace(setting_of(plan, 32), micro_batch=8), True)
    assert found.planned_bytes < bench.planned_bytes(setting_of(plan, 32), True)
    mixed = bench.remarks([found, row("litgpt", losses=[FRESH, 9.0]), replace(found, name="plain", micro_batch=32)])
    assert any("micro-batches differ" in remark for remark in mixed)


def test_no_micro_batch_fits(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, "echo 'out of memory: CUDA out of memory'; exit 20")
    found = bench.measured("litgpt", setting_of(plan, 6), plan, tmp_path, MACHINE)
    assert (found.status, found.reason) == ("not measured", "out of memory even with a micro-batch of 3")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'litgpt is not installed'; exit 21", "litgpt is not installed"),
        ("printf 'Traceback\\nValueError: bad shape\\nleaving\\n'; exit 1", "failed: ValueError: bad shape"),
        ("kill -9 $$", "failed: exit code -9"),
    ],
)
def test_a_candidate_that_cannot_be_measured_says_why(tmp_path: Path, script: str, reason: str) -> None:
    plan = plan_with(tmp_path, script)
    found = bench.measured("litgpt", setting_of(plan), plan, tmp_path, MACHINE)
    assert (found.status, found.reason) == ("not measured", reason)
    assert bench.line_of(found).endswith(f"not measured: {reason}")


def test_a_candidate_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    marker = tmp_path / "late"
    plan = plan_with(tmp_path, f"(sleep 2; touch {marker}) & wait", time_limit=0.3)
    assert "not done after" in bench.measured("litgpt", setting_of(plan), plan, tmp_path, MACHINE).reason
    time.sleep(2.2)
    assert not marker.exists()  # its children are gone too
    over = replace(plan, deadline=time.monotonic() - 1)
    assert "--quick are over" in bench.measured("litgpt", setting_of(plan), over, tmp_path, MACHINE).reason


def test_candidates_share_the_environment_and_no_launcher_reaches_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # by which Lightning takes itself for one of srun's
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    environment = bench._environment(plan_with(tmp_path, compiled=False))
    assert not {"WORLD_SIZE", "RANK", "SLURM_NTASKS"} & set(environment)
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert environment["TORCHDYNAMO_DISABLE"] == "1"


# --- The command line.


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    command = ["--rehearse", "--model", "llama2-0.5", "llama2-1b", "--candidates", "nanotron", "--steps", "0"]
    command += [
        "--python",
        "ours=/bin/sh",
        "litgpt=/nowhere/python",
        "--scratch",
        str(tmp_path / "absent"),
        "--json",
        str(tmp_path),
    ]
    with pytest.raises(UserError) as caught:
        bench.main(command)
    for part in (
        "llama2-0.5.yaml: no such config file",
        "llama2-1b has 1,000,564,736 parameters",
        "--candidates nanotron: not one of ours",
        "--python ours=/bin/sh: expected NAME=PATH",
        "/nowhere/python is no program",
        "--steps 0: at least 1",
        "no such folder",
        "is a folder; name a file",
    ):
        assert part in str(caught.value)


def test_without_a_gpu_the_rehearsal_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_sees_cuda", lambda: False)
    with pytest.raises(UserError, match="no CUDA device here; --rehearse"):
        bench.main(["--quick"])


def test_the_shipped_models_and_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_sees_cuda", lambda: True)
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: SimpleNamespace(free=17e9))
    whole = plan_of([])
    assert set(whole.models) == set(bench.GOALS)
    assert whole.candidates == tuple(name for name in bench.CANDIDATES if name != "ours")
    assert (whole.accumulation, whole.warm_up, whole.steps, whole.repeats) == (2, 5, 15, True)
    quick = plan_of(["--quick"])
    assert (set(quick.models), quick.candidates, quick.repeats) == ({"llama2-0.5b"}, ("plain",), False)
    assert quick.deadline - time.monotonic() < 90

    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: SimpleNamespace(free=15e9))
    with pytest.raises(UserError, match=r"has 15\.0 GB free, and initial weights take 16\.0 GB"):
        bench.main([])


def test_every_candidate_of_the_command_exists() -> None:
    worker = load_tool("bench/train_gpu_candidates")
    assert tuple(worker.CANDIDATES) == bench.CANDIDATES


# --- Other trainers hold the same model.


@pytest.mark.parametrize("name", bench.REHEARSED)
@pytest.mark.parametrize("trainer", ["transformers", "litgpt", "olmo_core"])
def test_others_compute_our_logits(trainer: str, name: str) -> None:
    pytest.importorskip(trainer)
    peers = load_tool("bench/training_peers")
    config = load_config(ModelConfig, TOOLS.parent / f"configs/models/{name}.yaml")
    ours = Transformer(config)
    initialise(ours, 0)
    tokens = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    weights = ours.state_dict()
    if trainer == "transformers":
        theirs = peers.transformers_model(weights, config)(input_ids=tokens, use_cache=False).logits
    elif trainer == "litgpt":
        theirs = peers.litgpt_model(weights, config)(tokens)
    else:
        model = peers.olmo_core_model(config, fused_loss=False)
        model.init_weights(max_seq_len=config.context_length, device=torch.device("cpu"))
        model.load_state_dict(peers.olmo_core_weights(weights, config))
        theirs = model(tokens)
    torch.testing.assert_close(theirs, ours(tokens), rtol=0, atol=1e-5)


def test_batches_do_not_depend_on_the_micro_batch() -> None:
    peers = load_tool("bench/training_peers")
    whole, halves = (peers.batches(64, 4, 16, micro, 2) for micro in (4, 2))
    for step, parts in zip(whole, halves, strict=True):
        assert len(parts) == 2
        for place in (0, 1):
            assert torch.equal(step[0][place], torch.cat([part[place] for part in parts]))
        assert torch.equal(step[0][0][:, 1:], step[0][1][:, :-1])


# --- All of it.


@pytest.mark.full
def test_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, the plain loop and transformers really train; in fp32, so that their losses agree closely."""
    json_file = tmp_path / "found" / "bench.json"
    command = ["--rehearse", "--quick", "--no-compile", "--precision", "fp32", "--model", "llama2-debug"]
    assert bench.main([*command, "--candidates", "plain", "transformers", "--json", str(json_file)]) == 0
    found = json.loads(json_file.read_text(encoding="utf-8"))
    assert found["ok"]
    assert found["rehearsal"]
    (report,) = found["models"]
    rows = {entry["name"]: entry for entry in report["rows"]}
    assert set(rows) == {"ours", "plain", "transformers"}
    expected = math.log(2048) + 0.2  # logits of the head's N(0, 2/(5d)) have a variance of 0.4
    assert report["machine"]["expected_first_loss"] == pytest.approx(expected, abs=0.01)
    for entry in rows.values():
        assert entry["status"] == "measured"
        assert len(entry["losses"]) == 10
        assert entry["losses"][0] == pytest.approx(expected, abs=0.05)
        assert entry["losses"] == pytest.approx(rows["ours"]["losses"], abs=2e-5)
        assert entry["peak_bytes"] is None  # counted on a GPU only
    printed = capsys.readouterr().out
    assert "REHEARSAL ON A CPU" in printed
    assert "all valid" in printed
