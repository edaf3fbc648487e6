"""What capturing costs a training run, and how fast activations are written, beside a plain copy of the same bytes.

    python tools/bench/capture.py [--turns 3] [--megabytes 1024]

The run is that of configs/runs/llama2-debug.yaml with the default schedule of `capture`, on a corpus that is made on the spot.
Counted is the time that training stands still: recording, handing over, waiting for the disk. Two whole runs, with and without,
differ by more than two hundredths of their time for other reasons; their times are printed beside it.

Writing counts from opening the writer until all is on disk, and so does the copy, shard by shard. They take turns and the best
turn counts, so that other work on the machine hits both alike.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command import at_least, parser, positive, run, verdict

ROOT = Path(__file__).resolve().parents[2]
MOST_OVERHEAD = 0.02
LEAST_SPEED = 0.8
BATCH_MEGABYTES = 16
"""Of what the writer is given at once, in MiB."""


def main() -> int:
    """Print the overhead and the speed of writing, each with its verdict; 1 if a target was missed."""
    reader = parser(__doc__)
    reader.add_argument("--turns", type=positive, default=3, help="turns of which the best counts [3]")
    reader.add_argument(
        "--megabytes", type=at_least(BATCH_MEGABYTES), default=1024, help=f"MiB to write, from {BATCH_MEGABYTES} on [1024]"
    )
    arguments = reader.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # /tmp may be memory
        cheap = overhead(Path(folder), arguments.turns)
        fast = writing(Path(folder), arguments.turns, arguments.megabytes)
    return 0 if cheap and fast else 1


def overhead(folder: Path, turns: int) -> bool:
    """A debug run with the default schedule: whether the share of its time for which capture held it up is small enough."""
    from megatron_plasticity.config.data import CorpusConfig, PythonTextConfig, ReasoningTextConfig, TokenizerConfig
    from megatron_plasticity.data.prepare import prepare

    corpus = prepare(
        CorpusConfig(
            name="bench",
            output=folder,
            python_text=PythonTextConfig(megabytes=0.5),
            reasoning_text=ReasoningTextConfig(documents=1000),
            tokenizer=TokenizerConfig(vocab_size=2048),
        )
    )
    _train(folder / "warm-up", corpus, captured=False)
    shares, with_capture, without = [], [], []
    for turn in range(turns):
        without.append(_train(folder / f"off-{turn}", corpus, captured=False)[0])
        seconds, held_up = _train(folder / f"on-{turn}", corpus, captured=True)
        with_capture.append(seconds)
        shares.append(held_up / seconds)
    good = min(shares) <= MOST_OVERHEAD
    print(f"capture: {min(shares):.2%} of the run's time, {verdict(good, f'at most {MOST_OVERHEAD:.0%}')}")
    print(f"  whole runs: {min(with_capture):.2f} s with, {min(without):.2f} s without", flush=True)
    return good


def _train(output: Path, corpus: Path, captured: bool) -> tuple[float, float]:
    """Seconds of a whole run, and those in which it waited for capture."""
    from megatron_plasticity.config.load import load_config
    from megatron_plasticity.config.training import PretrainConfig
    from megatron_plasticity.tracking.progress import NoProgress
    from megatron_plasticity.training import activations
    from megatron_plasticity.training.pretrain import pretrain

    overrides = [f"output={output}", f"data.folder={corpus}", "logging.mlflow=false"]
    config = load_config(
        PretrainConfig, ROOT / "configs/runs/llama2-debug.yaml", [*overrides, *([] if captured else ["capture=null"])]
    )
    spent = [0.0]
    with contextlib.ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()):
        for name in ("__init__", "before_step", "after_step", "before_checkpoint", "__exit__"):
            stack.enter_context(_timed(activations.Capture, name, spent))
        begun = time.perf_counter()
        pretrain(config, NoProgress())
        return time.perf_counter() - begun, spent[0]


@contextlib.contextmanager
def _timed(cls: type, name: str, spent: list[float]) -> Iterator[None]:
    """Add the seconds spent in a method of `cls` to `spent`."""
    method = getattr(cls, name)

    @functools.wraps(method)
    def timed(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            spent[0] += time.perf_counter() - begun

    setattr(cls, name, timed)
    try:
        yield
    finally:
        setattr(cls, name, method)


def writing(folder: Path, turns: int, megabytes: int) -> bool:
    """The writer against a plain copy of the shards that it wrote: whether it is fast enough."""
    import torch

    from megatron_plasticity.capture.writer import ActivationWriter

    points = ("embed", "layers.0.resid_post", "layers.1.resid_post", "final_norm")
    batch = {point: torch.randn(8, 128, 1024) for point in points}  # BATCH_MEGABYTES
    batches = megabytes // BATCH_MEGABYTES
    os.sync()
    writes, copies = [], []
    for _ in range(turns):
        target, copy = folder / "activations", folder / "copy"
        begun = time.perf_counter()
        with ActivationWriter(target, {"run": "bench"}) as writer, writer.dump(1):
            for _ in range(batches):
                writer.add(batch)
        writes.append(time.perf_counter() - begun)
        copy.mkdir()
        begun = time.perf_counter()
        for shard in sorted(target.rglob("*.safetensors")):
            shutil.copyfile(shard, copy / shard.name)
            with (copy / shard.name).open("rb") as file:
                os.fsync(file.fileno())
        copies.append(time.perf_counter() - begun)
        shutil.rmtree(target)
        shutil.rmtree(copy)
    ratio = min(copies) / min(writes)
    good = ratio >= LEAST_SPEED
    size = batches * BATCH_MEGABYTES
    print(f"writing: {size / min(writes):,.0f} MiB/s, a plain copy {size / min(copies):,.0f} MiB/s")
    print(f"ratio {ratio:.2f}, {verdict(good, f'at least {LEAST_SPEED:g}')}", flush=True)
    return good


if __name__ == "__main__":
    run(main)
