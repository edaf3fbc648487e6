"""Workers, and a terminal whose Ctrl-C reaches everybody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import multiprocessing, sys
from pathlib import Path
from megatron_plasticity.launch.workers import start_worker
from megatron_plasticity.training.signals import StopSignal

def job(path):
    Path(path).write_text("done")

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    context.set_forkserver_preload(["slow_to_import"])
    with StopSignal() as stop:
        process = start_worker(context, job, (sys.argv[2],), name="job", log=Path(sys.argv[2] + ".log"), threads=1)
        process.join()
    print(process.exitcode, int(stop.received or 0))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_the_fork_server_imports(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT)
    here = f"print('importing', flush=True)\nimport time\ntime.sleep(1.0)\nopen({str(tmp_path / 'imported')!r}, 'w').close()\n"
    (tmp_path / "slow_to_import.py").write_text(here)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", "forkserver", tmp_path / "result"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (tmp_path / "result").read_text() == "done", err
    assert out.split() == ["0", str(int(number))], "and the runner has heard the signal"
    assert "Traceback" not in err
