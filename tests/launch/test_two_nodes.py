"""Two nodes: `launch --hostfile` over real ssh and pdsh, training across them, and what happens when one of them is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import LostProcess
from megatron_plasticity.models.checkpoint import open_checkpoint
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.training.pretrain import pretrain
from tests.launch.nodes import Nodes, missing, two_nodes
from tests.launch.test_environment import SECRETS

_REASON = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
]

LONG = {
    "steps": 120,
    "batch": {"global_batch_size": 16, "micro_batch_size": 2},
    "evaluate_every_steps": 0,
    "checkpoint": {"every_steps": 10},
    "optimizer": {"eps": 1e-4},
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with two_nodes(tmp_path_factory.mktemp("nodes")) as both:
        yield both


class Launch:
    """`launch pretrain` on the first node, as a person types it there."""

    def __init__(self, nodes: Nodes, config: PretrainConfig, folder: Path, *options: str, path: str = "") -> None:
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
        environment = {
            **os.environ,
            **SECRETS,
            "PATH": f"{path}{os.environ['PATH']}",
            "PDSH_SSH_ARGS_APPEND": nodes.ssh_arguments,
            "GLOO_SOCKET_IFNAME": "eth0",  # a node's name leads nowhere
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-m",
            "megatron_plasticity",
            "launch",
            "pretrain",
            str(file),
            "--hostfile",
            str(nodes.hostfile),
        ]
        self.output = folder / "out"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(nodes.on_first([*command, *options]), env=environment, stdout=out, stderr=out)

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.returncode is None:
                self.process.send_signal(signal.SIGTERM)
                print(self.said)

    @property
    def said(self) -> str:
        return self.output.read_text()

    def wait_for(self, happened: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)


def processes_about(text: str) -> list[str]:
    """Command lines, of whatever node, that `text` occurs in."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in line:
                found.append(line)
    return found


def steps_saved(output: Path) -> list[int]:
    return [int(path.name[5:]) for path in output.glob("pretrain-*/checkpoints/step-*") if open_checkpoint(path)]


def test_two_nodes_train_as_one_process_and_no_secret_is_seen(
    nodes: Nodes, pretrain_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    changes = {"steps": 3, "batch": {"micro_batch_size": 2}, "engine": {"zero_stage": 2}, "optimizer": {"eps": 1e-4}}
    seen: set[str] = set()
    # pdsh and ssh live for long, a shell between them may not: what starts them writes its arguments down.
    for name in ("pdsh", "ssh"):
        wrapper = tmp_path / "bin" / name
        wrapper.parent.mkdir(exist_ok=True)
        wrapper.write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path / "arguments"}\nexec /usr/bin/{name} "$@"\n')
        wrapper.chmod(0o755)
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            seen.update(processes_about(""))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        launch = Launch(nodes, pretrain_config(changes), tmp_path, path=f"{tmp_path / 'bin'}:")
        code = launch.wait(300)
    finally:
        done.set()
        watcher.join()
    assert code == 0, launch.said
    assert "all-reduce  2 ranks over gloo" in launch.said
    assert launch.said.count("held_out_loss") == 1, "one rank speaks"

    alone = pretrain(pretrain_config({**changes, "output": str(tmp_path / "alone")}), NoProgress())
    together = RunFolder.open(tmp_path / "runs" / alone.path.name)
    for loss in ("held_out_loss", "seen_loss", "train_loss"):
        assert together.results[loss] == pytest.approx(alone.results[loss], rel=1e-5)
    ours, theirs = open_checkpoint(together.path).tensors(), open_checkpoint(alone.path).tensors()
    for name in theirs:
        assert float((ours[name] - theirs[name]).norm() / theirs[name].norm()) < 1e-5, name

    arguments = (tmp_path / "arguments").read_text()
    assert "pdsh -S" in arguments
    assert "MEGATRON_PLASTICITY_LAUNCH=" in arguments, "what is exported is seen"
    assert any("megatron_plasticity --local_rank" in line for line in seen), "the ranks are seen"
    logs = sorted((tmp_path / "runs" / "launches").rglob("*_rank*.log"))
    assert len(logs) == 2
    written = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    for name, secret in SECRETS.items():
        assert secret not in arguments, name
        assert not [line for line in seen if secret in line], name
        assert secret not in written, name


@pytest.mark.full
def test_a_lost_node_and_a_cut_cable_end_the_job_and_it_goes_on(
    nodes: Nodes, pretrain_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    config, output = pretrain_config(LONG), tmp_path / "runs"

    launch = Launch(nodes, config, tmp_path, "--skip-preflight")
    launch.wait_for(lambda: bool(steps_saved(output)), 120)
    begin = time.monotonic()
    nodes.kill("node2")
    code = launch.wait(90)
    print(f"the job ended {time.monotonic() - begin:.0f} s after its node was killed")
    assert time.monotonic() - begin < 60
    assert code == LostProcess.exit_code, launch.said
    assert "rank 1 on node2 ended without a word" in launch.said
    assert "the same command goes on from the latest checkpoint" in launch.said
    assert processes_about(str(output)) == []

    nodes.start("node2")
    before = max(steps_saved(output))
    launch = Launch(nodes, config, tmp_path, "--skip-preflight")
    launch.wait_for(lambda: max(steps_saved(output)) > before, 120)
    begin = time.monotonic()
    nodes.cut()
    try:
        code = launch.wait(90)
        print(f"the job ended {time.monotonic() - begin:.0f} s after the cable was cut")
        assert time.monotonic() - begin < 60
        assert code == LostProcess.exit_code, launch.said
        assert "rank 1 on node2 has given no sign of life" in launch.said
        # The other side hears nothing from here either.
        deadline = begin + 60
        while remaining := processes_about(str(output)):
            assert time.monotonic() < deadline, remaining
            time.sleep(0.5)
    finally:
        nodes.mend()

    between = max(steps_saved(output))
    assert between < config.total_steps, "there is something left to do"
    (first,) = output.glob("pretrain-*/checkpoints/step-10/model.json")
    written = first.stat().st_mtime_ns
    launch = Launch(nodes, config, tmp_path, "--skip-preflight", "--include", "node1")
    assert launch.wait(200) == 0, launch.said
    assert first.stat().st_mtime_ns == written, "no step was taken again"

    alone = pretrain(pretrain_config({**LONG, "output": str(tmp_path / "alone")}), NoProgress())
    survived = RunFolder.open(output / alone.path.name)
    assert survived.state.attempts == 3
    for loss in ("held_out_loss", "seen_loss", "train_loss"):
        assert survived.results[loss] == pytest.approx(alone.results[loss], rel=1e-5)
