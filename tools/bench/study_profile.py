"""Where a study spends its processor time: every process under py-spy, every sample sorted by what it was at.

    python tools/bench/study_profile.py [CONFIG] [KEY.PATH=VALUE …] [--folder DIR] [--py-spy PATH] [--rate 25]
    python tools/bench/study_profile.py --again DIR

Runs the study (default: the quickstart) and its report in a fresh folder and prints, per kind of run, which share of the time
went into training, sampling and analysis proper, and where the rest went. `--again` sorts what an earlier call recorded.

A sample counts when its thread ran or was ready to run. So other work on the machine lengthens seconds, all parts of what runs
meanwhile alike, and shares hold; between kinds of run only as far as that work was steady. The innermost frame that the tables
below name decides what a sample was at. Threads without Python frames, such as a tokenizer's own, are not seen. Beside it stands
the wall time of the runs, and how much of the time the places for runs were in use.

py-spy is no part of the project: `pip install py-spy` into any environment, and name its program if it is not on PATH.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from megatron_plasticity.config.load import load_config
from megatron_plasticity.config.study import StudyConfig
from megatron_plasticity.errors import UserError, ending_the_process
from megatron_plasticity.study.recipes import study_folder
from megatron_plasticity.tracking.process import usable_cores
from megatron_plasticity.tracking.run_state import RunState

TARGET = 0.8
"""Share of the time that training, sampling and analysis proper should have."""
MOST_UNCLASSIFIED = 0.03
ROOT = Path(__file__).resolve().parents[2]
RECORDS = ("run.txt", "report.txt")
STACKS_SHOWN = 8

PROPER = ("training", "sampling", "analysis")
WAITING = "waiting"
UNCLASSIFIED = "unclassified"

# What a process is for, by the function that it carries out. One without such a function belongs to the process that started it.
KINDS: dict[str, tuple[str, ...]] = {
    "pretrain": ("training/pretrain.py:pretrain",),
    "finetune": ("training/finetune.py:finetune",),
    "evaluate": ("evaluation/job.py:evaluate", "evaluation/job.py:harness"),
    "capture": ("evaluation/capture_job.py:capture",),
    "import": ("interchange/importing.py:import_model",),
    "analyse": tuple(f"analysis/jobs.py:{name}" for name in ("probes", "attention", "truncation", "overfitting", "features")),
    "report": ("verbs.py:study_report",),
    "runner": ("verbs.py:study_run",),
}

# Part → places: a file, a folder (with its slash), or a function or class with all that is defined in it. Paths begin below our
# package; with a slash before them, anywhere. Looked up from the innermost frame outwards.
PARTS: dict[str, tuple[str, ...]] = {
    "training": (
        "training/engine.py:TrainingEngine.train_batch",
        "training/engine.py:TrainingEngine.set_learning_rate",
        "optim/schedule.py",
    ),
    "sampling": (
        "evaluation/responses.py:answer_questions",
        "evaluation/sampler.py:NativeGenerator.generate",
        "evaluation/lm_eval.py:evaluate_tasks",
        "evaluation/verdicts.py",
        "evaluation/grading.py",
        "evaluation/extraction.py",
        "evaluation/math_pool.py",
        "evaluation/sandbox.py",
        "evaluation/sandbox_child.py",
        "evaluation/rewards.py",
        "evaluation/metrics.py",
        "evaluation/evaluate.py:_task_results",
    ),
    "analysis": (
        "analysis/probes.py",
        "analysis/attention.py",
        "analysis/attention_maps.py",
        "analysis/overfitting.py",
        "analysis/features.py",
        "analysis/truncation.py",
        "analysis/losses.py",
        "analysis/bootstrap.py",
        "analysis/training_dynamics.py",
        "analysis/weight_norms.py",
    ),
    "losses while training": ("training/losses.py", "training/callbacks.py:LossEvaluation", "data/ledger.py"),
    "capture": (
        "training/activations.py",
        "capture/writer.py",
        "capture/dump.py",
        "capture/shards.py",
        "capture/statistics.py",
        "capture/sequences.py",
        "evaluation/capture_sequences.py",
    ),
    "preparing data": (
        "data/prepare.py",
        "data/sft.py:encode_examples",
        "data/tokenizer.py:Tokenizer.load",
        "data/tokenizer.py:Tokenizer.encode_batch",
        "data/labelled_text.py",
        "data/probe_sets.py",
        "data/problems/",
        "evaluation/tasks/",
        "evaluation/evaluate.py:_prepare",
        "evaluation/inputs.py",
        "training/finetune.py:_encoded",
        "study/runner.py:_prepare",
        "study/runner.py:_prepare_in_worker",
    ),
    "reading batches": (
        "training/batches.py",
        "data/blocks.py",
        "data/token_store.py",
        "data/stream.py",
        "data/order.py",
        "data/micro_batch.py",
    ),
    "checkpoints": (
        "models/checkpoint.py",
        "training/session.py:TrainingSession.save",
        "training/session.py:_starting_point",
        "tracking/trained_model.py:TrainedModel.open",
        "tracking/trained_model.py:TrainedModel.pretraining_run",
    ),
    "starting": (
        "<frozen importlib._bootstrap>:_find_and_load",
        "<frozen importlib._bootstrap>:_handle_fromlist",
        "/importlib/__init__.py:import_module",
        "/deepspeed/__init__.py:initialize",
        "training/engine.py:TrainingEngine.__init__",
        "training/engine.py:TrainingEngine.close",
        "training/preflight.py",
        "parallel/grid.py:process_grid",
        "models/transformer.py:local_model",
        "models/initialisation.py",
        "launch/preload.py",
        "launch/workers.py:start_worker",
        "launch/workers.py:_redirect_output",
        "launch/workers.py:_end_with_parent",
        "/multiprocessing/spawn.py:spawn_main",
        "/multiprocessing/spawn.py:prepare",
        "/multiprocessing/forkserver.py:ForkServer",
        "/multiprocessing/resource_tracker.py",
    ),
    "tracking": (
        "training/callbacks.py:TrainingMetrics",
        "training/callbacks.py:Norms",
        "training/non_finite.py",
        "training/system_metrics.py",
        "tracking/metrics.py",
        "tracking/system_metrics.py",
        "tracking/progress.py",
        "tracking/run_folder.py",
        "tracking/run_state.py",
        "tracking/loss_spikes.py",
        "tracking/mlflow_background.py",
        "tracking/mlflow_mirror.py",
        "evaluation/kept_responses.py",
        "evaluation/samples.py",
    ),
    "runner": (
        "study/runner.py",
        "study/display.py",
        "study/claim.py",
        "study/plan.py",
        "study/check.py",
        "study/backends/",
        "config/load.py",
        "verbs.py:_study_config",
    ),
    "figures, report": (
        "study/report/",
        "study/results.py",
        "study/scores.py",
        "analysis/drawing.py",
        "analysis/attention_figure.py",
        "analysis/features_figure.py",
        "analysis/truncation_figure.py",
    ),
}

# Places that count when they are the innermost frame only, since everything else of a process is inside them.
INNERMOST: dict[str, tuple[str, ...]] = {
    # py-spy takes a thread for active that is about to sleep or has just woken.
    WAITING: (
        "/selectors.py:_PollLikeSelector.select",
        "/selectors.py:EpollSelector.select",
        "/threading.py:Condition.wait",
        "/threading.py:Event.wait",
        "/threading.py:Thread._wait_for_tstate_lock",
        "/multiprocessing/popen_fork.py:Popen.poll",
        "/multiprocessing/connection.py:Connection._recv",
        "/multiprocessing/connection.py:Connection._poll",
        "/multiprocessing/connection.py:wait",
        "/subprocess.py:Popen._try_wait",
    ),
    "training": ("training/loop.py:train",),
    "starting": (
        "/multiprocessing/forkserver.py:main",
        "/multiprocessing/forkserver.py:_serve_one",
        "/multiprocessing/spawn.py:_main",
        "/multiprocessing/process.py:BaseProcess._bootstrap",
        "launch/workers.py:_work",
    ),
}

_OURS = "megatron_plasticity"
_FRAME = re.compile(r"(?P<function>.*) \((?P<path>.*):\d+\)")
_PROCESS = re.compile(r'(?:^|;)process (\d+):"')


@dataclass(frozen=True)
class Sample:
    """A stack, and how often it was met."""

    processes: tuple[int, ...]
    """From the outermost to the one that the stack is of."""
    frames: tuple[str, ...]
    """From the outermost to the innermost, as `function (path:line)`."""
    count: int


@dataclass(frozen=True)
class Profile:
    """Samples by kind of run and part."""

    counts: Mapping[str, Counter[str]]
    unclassified: Counter[str]
    """Stacks that no rule knows, shortened."""

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in (*KINDS, "other") if kind in self.counts]

    def counted(self, *kinds: str) -> Counter[str]:
        """Samples of these kinds of run (default: all) by part, without those of threads that waited."""
        found: Counter[str] = Counter()
        for kind in kinds or self.kinds:
            found += self.counts[kind]
        del found[WAITING]
        return found


def read_samples(lines: Iterable[str]) -> Iterator[Sample]:
    """Of py-spy's `raw` format with processes and threads. Raises UserError for a line that is not of it."""
    for number, line in enumerate(lines, start=1):
        stack, _, count = line.rstrip("\n").rpartition(" ")
        head, thread, frames = stack.rpartition(";thread (")  # before it a command line may stand, with any characters
        processes = tuple(map(int, _PROCESS.findall(head)))
        if not (thread and processes and count.isdigit()):
            raise UserError(f"line {number} of what py-spy recorded is no stack of a thread: {line[:120]!r}")
        yield Sample(processes, tuple(frames.split(";")[1:]), int(count))


def sort_samples(samples: Iterable[Sample]) -> Profile:
    """Samples by kind of run and part."""
    samples = list(samples)
    votes: dict[int, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        if (kind := _first(sample.frames, KINDS)) is not None:
            votes[sample.processes[-1]][kind] += sample.count
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    unclassified: Counter[str] = Counter()
    for sample in samples:
        known = (votes[process].most_common(1)[0][0] for process in reversed(sample.processes) if process in votes)
        part = part_of(sample.frames)
        counts[next(known, "other")][part] += sample.count
        if part == UNCLASSIFIED:
            unclassified[" > ".join(sample.frames[-3:])] += sample.count
    return Profile(counts, unclassified)


def part_of(frames: Sequence[str]) -> str:
    """What a stack is at."""
    if not frames:  # of an interpreter that starts or ends
        return "starting"
    return _part(frames[-1], innermost=True) or _first(reversed(frames), PARTS) or UNCLASSIFIED


def _first(frames: Iterable[str], table: Mapping[str, Sequence[str]]) -> str | None:
    look = _kind if table is KINDS else _part
    return next((found for frame in frames if (found := look(frame)) is not None), None)


@functools.cache
def _kind(frame: str) -> str | None:
    return _named_in(frame, KINDS)


@functools.cache
def _part(frame: str, innermost: bool = False) -> str | None:
    return _named_in(frame, INNERMOST if innermost else PARTS)


def _named_in(frame: str, table: Mapping[str, Sequence[str]]) -> str | None:
    match = _FRAME.fullmatch(frame)
    if match is None:
        return None
    path, function = match["path"], match["function"]
    return next((name for name, places in table.items() if any(_is_at(path, function, place) for place in places)), None)


def _is_at(path: str, function: str, place: str) -> bool:
    file, _, name = place.partition(":")
    if name and not (function == name or function.startswith(f"{name}.")):
        return False
    if not file.startswith(("/", "<")):
        file = f"/{_OURS}/{file}"
    return file in path if file.endswith("/") else path.endswith(file)


# --- Running and recording.


def main(arguments: Sequence[str] | None = None) -> int:
    """Record a study, or take an earlier record, and print the table; 0 if the target is met and next to nothing unclassified."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=ROOT / "configs/studies/quickstart.yaml", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY.PATH=VALUE", help="settings that replace the file's")
    parser.add_argument("--folder", type=Path, help="new folder for study, corpus and records [a temporary one, which is kept]")
    parser.add_argument("--again", type=Path, metavar="DIR", help="sort what was recorded in this folder; run nothing")
    parser.add_argument("--py-spy", type=Path, metavar="PATH", help="py-spy's program [the one on PATH]")
    parser.add_argument("--rate", type=int, default=25, help="samples per second [25]")
    parsed = parser.parse_args(arguments)
    if parsed.again is not None:
        return show(parsed.again)
    if parsed.rate < 1:
        raise UserError(f"--rate {parsed.rate}: expected 1 or more samples per second")
    py_spy = find_py_spy(parsed.py_spy)
    folder: Path = parsed.folder or Path(tempfile.mkdtemp(prefix="study-profile-"))
    record(py_spy, parsed.config, parsed.overrides, folder, parsed.rate)
    return show(folder)


def find_py_spy(path: Path | None) -> Path:
    """py-spy's program. Raises UserError that tells how to get it if it is not there."""
    found = shutil.which("py-spy" if path is None else path)
    if found is None:
        where = "not on PATH" if path is None else f"no program at {path}"
        raise UserError(
            f"py-spy: {where}. Install it into an environment of its own, `python -m venv /tmp/py-spy && /tmp/py-spy/bin/pip "
            "install py-spy`, and name it: --py-spy /tmp/py-spy/bin/py-spy"
        )
    return Path(found).absolute()


def record(py_spy: Path, path: Path, overrides: Sequence[str], folder: Path, rate: int) -> None:
    """Run a study and its report under py-spy, all in `folder`. Raises UserError if one fails, or the folder holds something."""
    fresh = [*overrides, f"output={folder.absolute() / 'runs'}"]
    config = load_config(StudyConfig, path, fresh)
    if config.resources.backend != "local":
        raise UserError(
            f"resources.backend={config.resources.backend}: only runs on this machine can be looked at; expected local"
        )
    if config.corpus is not None:
        fresh.append(f"corpus.output={folder.absolute() / 'data'}")
    study = study_folder(config)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; a profile is that of a whole study. Name a new folder, or none")
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "study": str(study),
        "rate": rate,
        "began": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "versions": {name: version(name) for name in ("torch", "deepspeed", "mlflow")},
    }
    (folder / "profile.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
    commands = (["study", "run", str(path), *fresh], ["study", "report", str(study)])
    for name, command in zip(RECORDS, commands, strict=True):
        watched = [sys.executable, "-m", _OURS, *command]
        options = ["--subprocesses", "--threads", "--full-filenames", "--function", "--format", "raw", "--rate", str(rate)]
        ended = subprocess.run([str(py_spy), "record", *options, "--output", str(folder / name), "--", *watched], check=False)
        if not (folder / name).is_file():
            raise UserError(f"py-spy recorded nothing (exit code {ended.returncode}); where it may not look, run it as root")
        if ended.returncode:
            raise UserError(f"{' '.join(command[:2])} failed with exit code {ended.returncode}; see above")


def show(folder: Path) -> int:
    """Print the tables of what was recorded in `folder`. Raises UserError if nothing was."""
    missing = [name for name in ("profile.json", *RECORDS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: holds no whole record of a study ({', '.join(missing)} not found)")
    told = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    samples: list[Sample] = []
    for name in RECORDS:
        with (folder / name).open(encoding="utf-8") as file:
            samples += read_samples(file)
    profile = sort_samples(samples)
    if not profile.counted():
        raise UserError(f"{folder}: py-spy met no thread at work; raise --rate")
    versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    print(f"{told['began']}, {versions}, {usable_cores()} cores; {told['rate']} samples per second; {folder}")
    print("\n".join(table(profile, told["rate"])))
    print("\n".join(wall_times(Path(told["study"]))))
    total = profile.counted()
    proper = sum(total[part] for part in PROPER) / total.total()
    unclassified = total[UNCLASSIFIED] / total.total()
    verdict = "as wanted" if proper >= TARGET else "TOO LITTLE"
    print(f"training, sampling and analysis proper: {proper:.1%}, {verdict} (target {TARGET:.0%})")
    for stack, count in profile.unclassified.most_common(STACKS_SHOWN):
        print(f"  unclassified {count / total.total():6.2%}  {stack}")
    if unclassified > MOST_UNCLASSIFIED:
        print(f"{unclassified:.1%} is unclassified: the tables PARTS and INNERMOST should say what it is")
    return 0 if proper >= TARGET and unclassified <= MOST_UNCLASSIFIED else 1


def table(profile: Profile, rate: int) -> list[str]:
    """Seconds by kind of run, and shares by part."""
    parts = [*PARTS, *([UNCLASSIFIED] if profile.unclassified else [])]
    lines = [f"{'on a core, or ready':24}" + "".join(f"{kind:>10}" for kind in (*profile.kinds, "all"))]
    columns = [profile.counted(kind) for kind in profile.kinds] + [profile.counted()]
    lines.append(f"{'  seconds':24}" + "".join(f"{column.total() / rate:>10,.0f}" for column in columns))
    for part in parts:
        shares = [column[part] / max(1, column.total()) for column in columns]
        lines.append(f"{'  ' + part:24}" + "".join(f"{share:>10.1%}" if share else f"{'–':>10}" for share in shares))
    return lines


def wall_times(study: Path) -> list[str]:
    """Seconds of the runs by kind, and how well the places for runs were used."""
    described = json.loads((study / "study.json").read_text(encoding="utf-8"))
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for cell in described["cells"]:
        state = RunState.read(study / cell["folder"] / "state.json")
        if state.started is not None and state.finished is not None:
            spans[cell["kind"]].append((state.started, state.finished))
    every = [span for of_kind in spans.values() for span in of_kind]
    resources = described["config"]["resources"]
    places = resources["slots"] or max(1, usable_cores() // (resources["threads"] * resources["processes_per_run"]))
    whole = max(end for _, end in every) - min(start for start, _ in every)
    used = sum(end - start for start, end in every) / (places * whole)
    lines = [f"wall time: {whole:,.0f} s from the first run to the last; {places} places for runs, {used:.1%} in use"]
    lines += [
        f"  {kind:22}{len(of_kind):>4} runs {sum(end - start for start, end in of_kind):>8,.0f} s"
        for kind, of_kind in spans.items()
    ]
    return lines


if __name__ == "__main__":
    with ending_the_process():
        sys.exit(main())
