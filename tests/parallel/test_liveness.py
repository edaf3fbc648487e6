"""Processes that watch over one another: who is said to be gone, when, and what is left alone."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_plasticity.config.parallel import ParallelConfig
from megatron_plasticity.config.training import PretrainConfig
from megatron_plasticity.errors import Interrupted, LostProcess, UserError
from megatron_plasticity.parallel.grid import process_grid
from megatron_plasticity.parallel.liveness import Liveness, Patience
from megatron_plasticity.tracking.progress import NoProgress
from megatron_plasticity.training.pretrain import pretrain, pretrain_folder
from tests.ranks import run_on_ranks, start_ranks

PATIENCE = Patience(between_signs=0.05, silence=0.6, without_progress=0.2, answers=0.5, stall=0.8)
Join = Callable[[int], Liveness]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Rank → why it ended itself, instead of ending the test's process."""
    reasons: dict[int, str] = {}

    def end(self: Liveness) -> None:
        reasons.setdefault(self.rank, self._reason)
        self._closing.set()

    monkeypatch.setattr(Liveness, "_end", end)
    return reasons


@pytest.fixture
def join(ended: dict[int, str]) -> Iterator[Join]:
    """Makes ranks in threads of this process; the first call makes rank 0."""
    main = Liveness(0, PATIENCE)
    port, token = main.listen()
    all_ranks = {0: main}

    def make(rank: int) -> Liveness:
        if rank not in all_ranks:
            all_ranks[rank] = Liveness(rank, PATIENCE)
            all_ranks[rank].connect("127.0.0.1", port, token)
        return all_ranks[rank]

    yield make
    for liveness in all_ranks.values():
        liveness.close()


def port_of(main: Liveness) -> int:
    assert main._listener is not None
    return int(main._listener.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_those_who_leave_in_peace_are_not_missed(join: Join, ended: dict[int, str]) -> None:
    for rank in (1, 2):
        with join(rank).member():
            pass
        join(rank).close()
    with pytest.raises(Interrupted), join(0).member():
        raise Interrupted("all agreed to stop", signal.SIGTERM)
    time.sleep(2 * PATIENCE.silence)
    assert ended == {}


def test_who_ends_without_a_word_is_named_to_all(join: Join, ended: dict[int, str]) -> None:
    first, second = join(1), join(2)
    wait_until(lambda: len(join(0)._peers) == 2 and all(peer.rank for peer in join(0)._peers))
    first._closing.set()  # as if killed: the kernel closes its connections
    first._peers[0].connection.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: {0, 2} <= ended.keys())
    assert ended[0] == ended[2]
    assert f"rank 1 on {socket.gethostname()} ended without a word" in ended[2]
    assert second is join(2)


def test_an_error_on_one_rank_is_told_to_all_in_its_words(join: Join, ended: dict[int, str]) -> None:
    for rank in (1, 2):
        join(rank)
    with pytest.raises(UserError), join(1).member():
        raise UserError("data.folder: the disk of this node is gone")
    wait_until(lambda: {0, 2} <= ended.keys())
    assert "rank 1 on" in ended[2]
    assert "the disk of this node is gone" in ended[2]


def test_the_main_process_is_watched_as_well(join: Join, ended: dict[int, str]) -> None:
    join(1)
    with pytest.raises(ValueError, match="a defect"), join(0).member():
        raise ValueError("a defect")
    wait_until(lambda: 1 in ended)
    assert "rank 0 on" in ended[1]
    assert "ValueError: a defect" in ended[1]


def test_silence_counts_as_death(join: Join, ended: dict[int, str]) -> None:
    """As when a network is cut: no connection ends, nothing arrives."""
    join(1)
    silent = socket.create_connection(("127.0.0.1", port_of(join(0))))
    silent.sendall(f"{join(0)._token} 7 node7\n".encode())
    wait_until(lambda: {0, 1} <= ended.keys())
    assert "rank 7 on node7 has given no sign of life for 0.6 s" in ended[1]


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"wrong-token 1 x\n",
        b"[]\n",
        b"\xff\xfe\n",
        b"x" * 200_000,
        b"[" * 60_000 + b"\n",
        b"{token} 1 x\n" + b"[" * 60_000 + b"\n",
        b"{token} one x\n",
    ],
)
def test_strangers_are_shown_the_door(join: Join, ended: dict[int, str], words: bytes) -> None:
    stranger = socket.create_connection(("127.0.0.1", port_of(join(0))))
    stranger.settimeout(5.0)
    with pytest.raises((ConnectionError, EOFError)):
        stranger.sendall(words.replace(b"{token}", join(0)._token.encode()))
        while stranger.recv(1000):
            pass
        raise EOFError
    assert ended == {}
    thread = join(0)._thread
    assert thread is not None
    assert thread.is_alive()


def test_nobody_ends_who_gets_on_or_is_busy(join: Join, ended: dict[int, str]) -> None:
    worker, writer = join(0), join(1)
    with writer.busy():
        with pytest.raises(UserError), join(2).member():
            raise UserError("gone")
        deadline = time.monotonic() + 4 * PATIENCE.without_progress
        while time.monotonic() < deadline:
            worker.beat()
            time.sleep(0.02)
        assert ended == {}
        with writer.exchanging():  # waits for others, although a checkpoint is being written
            wait_until(lambda: 1 in ended)
    wait_until(lambda: 0 in ended)


def test_a_stall_names_who_does_not_wait_for_others(join: Join, ended: dict[int, str], capfd: pytest.CaptureFixture[str]) -> None:
    first = join(1)
    wait_until(lambda: len(join(0)._peers) == 1)
    with join(0).watched(), first.watched():
        wait_until(lambda: {0, 1} <= ended.keys())
    assert "no process has got on for" in ended[0]
    assert f"rank 0 on {socket.gethostname()}, rank 1 on {socket.gethostname()}: is in " in ended[1]
    assert "test_liveness.py" in capfd.readouterr().err, "the stacks are in the log"


def test_an_error_of_the_library_gives_way_to_its_reason(join: Join, ended: dict[int, str]) -> None:
    for rank in (1, 2):
        join(rank)

    def fail() -> None:
        with pytest.raises(UserError), join(1).member():
            raise UserError("out of memory")

    with pytest.raises(LostProcess, match=r"rank 1 on .*out of memory"), join(2).member():
        threading.Timer(0.3, fail).start()
        raise RuntimeError("Connection closed by peer")


def test_who_cannot_be_accepted_is_not_watched(join: Join, ended: dict[int, str], monkeypatch: Any, capfd: Any) -> None:
    """As when the main process may open no more files: a warning, and the job goes on."""

    def no_more_files() -> None:
        raise OSError(24, "Too many open files")

    first = join(1)
    wait_until(lambda: len(join(0)._peers) == 1)
    monkeypatch.setattr(join(0), "_listener", SimpleNamespace(accept=no_more_files, close=lambda: None, fileno=lambda: -1))
    listener = next(key.fileobj for key in join(0)._selector.get_map().values() if key.data is None)
    monkeypatch.setattr(join(0)._selector, "unregister", lambda _: unregistered.append(1) or true_unregister(listener))
    unregistered: list[int] = []
    true_unregister = type(join(0)._selector).unregister.__get__(join(0)._selector)
    socket.create_connection(listener.getsockname()[:2] if isinstance(listener, socket.socket) else ("", 0))  # type: ignore[arg-type]
    wait_until(lambda: bool(unregistered))
    time.sleep(2 * PATIENCE.silence)
    assert ended == {}
    assert first._thread is not None
    assert "cannot watch over more processes" in capfd.readouterr().err


def test_the_same_error_on_all_ends_each_with_its_own(join: Join, ended: dict[int, str]) -> None:
    """Nobody is ended from outside while it unwinds, though it has not got on for long."""
    join(1)
    time.sleep(2 * PATIENCE.without_progress)
    for rank in (1, 0):
        with pytest.raises(UserError, match=f"of rank {rank}"), join(rank).member():
            time.sleep(0.5 * PATIENCE.without_progress)
            raise UserError(f"the loss of rank {rank} is not finite")
    assert ended == {}


def test_the_exit_code_is_that_of_who_failed_first(join: Join, ended: dict[int, str]) -> None:
    join(2)
    with pytest.raises(UserError), join(1).member():
        raise UserError("a config that cannot be")
    wait_until(lambda: {0, 2} <= ended.keys())
    assert join(2)._exit_code == UserError.exit_code
    assert LostProcess("gone").exit_code == 75


def test_a_signal_to_one_rank_alone_is_told_to_the_others(join: Join, ended: dict[int, str]) -> None:
    join(2)
    with pytest.raises(Interrupted), join(1).member():
        raise Interrupted("stopped by SIGTERM while it loaded", signal.SIGTERM)
    wait_until(lambda: 2 in ended)
    assert "stopped by SIGTERM while it loaded" in ended[2]


def test_who_waits_for_a_busy_main_process_waits_on(join: Join, ended: dict[int, str]) -> None:
    first = join(1)
    wait_until(lambda: len(join(0)._peers) == 1)
    with join(0).busy(), first.watched():
        time.sleep(2 * PATIENCE.stall)
    assert ended == {}


def test_all_are_told_of_the_end_though_some_leave_meanwhile(join: Join, ended: dict[int, str]) -> None:
    ranks = [join(rank) for rank in range(1, 12)]
    wait_until(lambda: len(join(0)._peers) == len(ranks))
    with join(0).member():
        for rank in ranks[::2]:
            with rank.member():
                pass
            rank.close()
    join(0).close()
    time.sleep(3 * PATIENCE.without_progress)
    assert ended == {}


def test_every_group_of_processes_has_the_time_limit_of_the_config(tmp_path: Path) -> None:
    """DeepSpeed makes groups of its own, for which it states none."""
    assert run_on_ranks(2, timeouts_of_groups, log=tmp_path / "log") == [[180.0] * 4] * 2


def timeouts_of_groups() -> list[float]:
    """On a rank, with groups made by us and by DeepSpeed."""
    import deepspeed.comm
    import torch

    with process_grid(torch.device("cpu"), ParallelConfig(tensor=2, timeout_minutes=1)) as grid:
        groups = [
            torch.distributed.group.WORLD,
            grid.tensor.group,
            torch.distributed.new_group([0, 1]),
            deepspeed.comm.new_group([0, 1]),
        ]
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_alone_nothing_is_watched() -> None:
    liveness = Liveness()
    with liveness.member(), liveness.watched(), liveness.busy():
        liveness.beat()
    liveness.close()


def train(config: PretrainConfig) -> None:
    """On a rank."""
    pretrain(config, NoProgress())


@pytest.mark.distributed
def test_a_rank_that_is_killed_ends_the_others_with_the_reason(
    pretrain_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    """And the same command goes on from the latest checkpoint, on fewer ranks."""
    config = pretrain_config(
        {"steps": 2000, "batch": {"micro_batch_size": 1}, "checkpoint": {"every_steps": 5}, "engine": {"zero_stage": 1}}
    )
    log = tmp_path / "log"
    processes = start_ranks(2, train, config, log=log)
    try:
        folder = pretrain_folder(config)
        wait_until(lambda: bool(folder.checkpoints()), 60.0)
        assert processes[1].pid is not None
        os.kill(processes[1].pid, signal.SIGKILL)
        killed = time.monotonic()
        processes[0].join(60.0)
        assert time.monotonic() - killed < 45.0
        assert processes[0].exitcode == LostProcess.exit_code, log.read_text()
    finally:
        for process in processes:
            process.kill()
            process.join()
    state = folder.state
    assert state.status == "failed"
    assert f"rank 1 on {socket.gethostname()} ended without a word" in (state.error or "")
