"""A run that takes a moment instead of a training: it counts to ten, keeps a checkpoint, and misbehaves as a file tells it to.

`behaviour.json` in the study's folder: name of a run → how its attempts go, one word each; further attempts go well. What waits
goes on once there is a file `go` in that folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_plasticity.errors import UserError
from megatron_plasticity.tracking.run_folder import RunFolder

STEPS = 10


def run(config: Any, progress: Any) -> RunFolder:
    folder = RunFolder.open(Path(sys.argv[1]))
    if folder.is_done:
        return folder
    told = folder.path.parent / "behaviour.json"
    behaviour = json.loads(told.read_text()) if told.is_file() else {}
    with folder.running():
        attempt = folder.state.attempts
        words = behaviour.get(folder.name, "").split()
        word = words[attempt - 1] if attempt <= len(words) else "well"
        print(f"attempt {attempt}: {word}", flush=True)
        begin = _saved(folder)
        for step in range(begin, STEPS):
            _step(folder, step + 1, word)
        folder.mark_done({"held_out_loss": 1.0, "begin": begin, "host": os.environ.get("FAKE_HOST")})
    return folder


def _step(folder: RunFolder, step: int, word: str) -> None:
    folder.update_progress(step, STEPS, "steps", tokens_per_second=100.0)
    match word:
        case "killed" if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory" if step == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        case "wrong" if step == 2:
            raise UserError("optimizer.learning_rate: too large")
        case "saved-then-killed" if step == _saved(folder) + 2:
            _save(folder, step)
            os.kill(os.getpid(), signal.SIGKILL)
        case "keeps-nothing" if step == 2:
            time.sleep(600)
        case "hangs" if step == 2:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case "waits":
            try:
                while not (folder.path.parent / "go").exists():
                    time.sleep(0.05)
            except BaseException:
                _save(folder, step)
                raise
        case _:
            time.sleep(0.01)


def _saved(folder: RunFolder) -> int:
    return max((int(path.name.removeprefix("step-")) for path in folder.checkpoints()), default=0)


def _save(folder: RunFolder, step: int) -> None:
    (folder.path / "checkpoints" / f"step-{step}").mkdir(parents=True, exist_ok=True)
