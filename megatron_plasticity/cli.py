"""The command line: a table of verbs, and how an error ends. Heavy imports happen inside the verbs, so `--help` is instant."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_plasticity import __version__, verbs
from megatron_plasticity.errors import UserError
from megatron_plasticity.training.signals import raise_interrupted_on_signals

PROGRAM = "megatron-plasticity"
LAUNCHED = ("pretrain", "finetune", "evaluate")
"""What `launch` starts."""


@dataclass(frozen=True)
class Verb:
    """One command: its words, the function that does it, and what its help says."""

    words: tuple[str, ...]
    run: Callable[[argparse.Namespace], int | None]
    summary: str
    example: str
    takes: str = "config"
    """`config`: a YAML file and overrides; `config or folder`: the same, or a run folder instead of the file; `source`: the same,
    or what to import instead; `command and config`: the same, after the name of a command; `folder`: a run or study folder;
    `options`: only what `options` adds."""
    options: Callable[[argparse.ArgumentParser], None] | None = None
    """Adds options of this command's own."""


def _plan_options(command: argparse.ArgumentParser) -> None:
    command.usage = f"{PROGRAM} plan CONFIG [KEY.PATH=VALUE …] [options]"
    command.add_argument("--gpus", type=int, nargs="+", default=[8], metavar="N", help="numbers of GPUs to plan for (default: 8)")
    command.add_argument("--gpu", default="h100", metavar="NAME", help="kind of GPU: h100, h200 or a100 (default: h100)")
    command.add_argument("--memory", type=float, metavar="GIB", help="memory of one GPU (default: that of its kind)")
    command.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs with fast links among them (default: 8)")
    command.add_argument("--network", type=float, default=400.0, metavar="GBIT", help="Gbit/s per GPU among nodes (default: 400)")
    command.add_argument("--mfu", type=float, help="assume this share of the peak instead of predicting")
    command.add_argument("--assumptions", action="store_true", help="print every figure that predicted times rest on")


def _show_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--step", type=int, required=True, metavar="N", help="step, 1 for the first, as in metrics.jsonl")
    command.add_argument("--sequences", type=int, metavar="K", help="only the first K sequences of the step")
    command.add_argument("--ids", action="store_true", help="print token ids beside the text")


def _export_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: RUN/huggingface/step-N)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="number format (default: float32)")
    command.add_argument("--no-parity", dest="parity", action="store_false", help="do not compare with transformers' model")


def _doctor_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="the same facts as JSON, to compare machines")


def _evaluate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--show", type=int, default=0, metavar="N", help="print the answers to N questions of each test set")


def _study_plan_options(command: argparse.ArgumentParser) -> None:
    _study_options(command)
    command.add_argument("--memory", type=float, default=80.0, metavar="GIB", help="memory of one GPU (default: 80)")
    command.add_argument("--mfu", type=float, default=0.4, help="assumed share of the GPU's peak FLOP/s (default: 0.4)")


def _study_options(command: argparse.ArgumentParser) -> None:
    where = command.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="on machines with lines such as: node1 slots=8")
    where.add_argument("--slurm", action="store_true", help="as array jobs of Slurm")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds that is more than 0")
    return seconds


def _study_status_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--all", action="store_true", help="list every run")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="everything as JSON")
    how.add_argument("--watch", action="store_true", help="show it anew until every run is done")
    command.add_argument("--seconds", type=_seconds, default=5.0, metavar="S", help="between two looks of --watch (default: 5)")


def _study_retry_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("cells", nargs="*", metavar="RUN", help="as `study status` calls them (default: those that failed)")


def _compare_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="study folders, or one with several groups")
    command.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: comparison-… beside the first)")
    command.add_argument("--any-finetuning", action="store_true", help="compare groups that were not fine-tuned alike, too")


def _capture_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the run's last)")


def _tasks_prepare_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("tasks", nargs="+", metavar="TASK", help="name of a task or a suite (see `tasks list`), or a task file")
    command.add_argument("--from", dest="source", type=Path, metavar="DIR", help="folder with the data (default: the hub)")
    _tasks_folder_option(command, "--output", "where to write")
    command.add_argument("--strict", action="store_true", help="make errors of warnings")
    command.add_argument("--dry-run", action="store_true", help="check the files, say what would be read, and stop")


def _tasks_list_options(command: argparse.ArgumentParser) -> None:
    _tasks_folder_option(command, "--folder", "where tasks are prepared")


def _tasks_show_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("task", metavar="TASK", help="name of a task that is prepared, or of a procedural one")
    command.add_argument("--side", choices=("train", "test"), default="test", help="which examples (default: test)")
    command.add_argument("--number", type=int, default=3, metavar="N", help="how many of each set (default: 3)")
    _tasks_folder_option(command, "--folder", "where tasks are prepared")


def _tasks_folder_option(command: argparse.ArgumentParser, name: str, what: str) -> None:
    command.add_argument(name, type=Path, default=Path("data/tasks"), metavar="DIR", help=f"{what} (default: data/tasks)")


def _launch_options(command: argparse.ArgumentParser) -> None:
    command.usage = f"{PROGRAM} launch {{{','.join(LAUNCHED)}}} CONFIG [KEY.PATH=VALUE …] [options]"
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="on its machines (--include or --exclude some)")
    where.add_argument("--slurm", action="store_true", help="as a Slurm job (with --nodes N --gpus-per-node N)")
    where.add_argument("--local", type=int, metavar="N", help="N processes on this machine")
    for option in ("--include", "--exclude", "--master-addr", "--time", "--partition", "--account"):
        command.add_argument(option, help=argparse.SUPPRESS)  # named in the lines of others, and in docs/cluster.md
    for option in ("--nodes", "--gpus-per-node"):
        command.add_argument(option, type=int, help=argparse.SUPPRESS)
    command.add_argument("--setup", action="append", default=[], help=argparse.SUPPRESS)
    command.add_argument("--all-reduce-seconds", type=float, default=300.0, help=argparse.SUPPRESS)
    command.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="more for Slurm, such as qos=high")
    command.add_argument("--master-port", type=int, metavar="PORT", help="where ranks meet (default: 29500; --local: a free one)")
    command.add_argument("--env", action="append", default=[], metavar="NAME", help="hand on this variable too")
    command.add_argument("--logs", type=Path, metavar="DIR", help="shared folder for logs (default: OUTPUT/launches)")
    command.add_argument("--skip-preflight", action="store_true", help="do not check run and machines")


VERBS = (
    Verb(
        ("study", "run"),
        verbs.study_run,
        "run everything of a study that is not done yet",
        "configs/studies/quickstart.yaml",
        options=_study_options,
    ),
    Verb(
        ("study", "plan"),
        verbs.study_plan,
        "print the runs of a study and what they need",
        "configs/studies/quickstart.yaml",
        options=_study_plan_options,
    ),
    Verb(
        ("study", "status"),
        verbs.study_status,
        "how far a study is",
        "runs/quickstart --watch",
        "folder",
        _study_status_options,
    ),
    Verb(
        ("study", "retry"),
        verbs.study_retry,
        "run again what failed in a study",
        "runs/quickstart pretrain-wd1",
        "folder",
        _study_retry_options,
    ),
    Verb(("study", "cancel"), verbs.study_cancel, "take a study's jobs out of Slurm's queue", "runs/quickstart", "folder"),
    Verb(("study", "report"), verbs.study_report, "write the report of a study", "runs/quickstart", "folder"),
    Verb(
        ("study", "compare"),
        verbs.study_compare,
        "whether the best λ moves from study to study",
        "runs/olmo2-20x runs/olmo2-140x",
        "options",
        _compare_options,
    ),
    Verb(
        ("data", "prepare"), verbs.data_prepare, "build a corpus: text, tokenizer, token files", "configs/corpora/quickstart.yaml"
    ),
    Verb(
        ("data", "show"),
        verbs.data_show,
        "print what a pretraining run saw at a step",
        "runs/pretrain-NAME-HASH --step 100 --sequences 2",
        "folder",
        _show_options,
    ),
    Verb(
        ("tasks", "prepare"),
        verbs.tasks_prepare,
        "make tasks ready: read, check, look for overlap",
        "gsm8k pubmedqa-labelled --from path/to/data",
        "options",
        _tasks_prepare_options,
    ),
    Verb(
        ("tasks", "list"),
        verbs.tasks_list,
        "all tasks and suites, their sources, what is ready",
        "",
        "options",
        _tasks_list_options,
    ),
    Verb(
        ("tasks", "show"),
        verbs.tasks_show,
        "print examples of a task as a model sees them",
        "gsm8k --side train --number 3",
        "options",
        _tasks_show_options,
    ),
    Verb(
        ("plan",),
        verbs.plan,
        "what a pretraining run needs, and how to lay it out",
        "configs/runs/llama2-4b-20x.yaml --gpus 8 32 128",
        options=_plan_options,
    ),
    Verb(("doctor",), verbs.doctor, "one page about this machine, and what to mend", "", "options", _doctor_options),
    Verb(("pretrain",), verbs.pretrain, "pretrain one model", "configs/runs/llama2-debug.yaml optimizer.weight_decay=0.5"),
    Verb(
        ("import-hf",),
        verbs.import_hf,
        "a run folder from a Hugging Face model",
        "allenai/OLMo-2-0425-1B name=olmo2-1b",
        "source",
    ),
    Verb(
        ("export-hf",),
        verbs.export_hf,
        "a Hugging Face folder from a run",
        "runs/FOLDER --dtype bfloat16",
        "folder",
        _export_options,
    ),
    Verb(
        ("finetune",),
        verbs.finetune,
        "fine-tune a model on one task",
        "configs/finetune/debug.yaml base=runs/pretrain-llama2-debug-HASH",
    ),
    Verb(
        ("evaluate",),
        verbs.evaluate,
        "ask a model the test questions of some tasks",
        "configs/evaluate/debug.yaml run=runs/FOLDER --show 20",
        options=_evaluate_options,
    ),
    Verb(("lm-eval",), verbs.lm_eval, "tasks of lm-evaluation-harness", "configs/evaluate/cloze.yaml run=runs/FOLDER"),
    Verb(
        ("capture",),
        verbs.capture,
        "dump activations of a model",
        "configs/analyze/capture.yaml run=runs/FOLDER --step 400",
        "config or folder",
        _capture_options,
    ),
    Verb(
        ("analyze", "probes"), verbs.analyze_probes, "linear probes of every layer", "configs/analyze/probes.yaml run=runs/FOLDER"
    ),
    Verb(
        ("analyze", "attention"),
        verbs.analyze_attention,
        "spectra of the attention matrices",
        "configs/analyze/attention.yaml run=runs/FOLDER",
    ),
    Verb(
        ("analyze", "truncation"),
        verbs.analyze_truncation,
        "loss if every head keeps rank k only",
        "configs/analyze/truncation.yaml run=runs/FOLDER ranks=[1,4]",
    ),
    Verb(
        ("analyze", "overfitting"),
        verbs.analyze_overfitting,
        "train–validation gap",
        "configs/analyze/overfitting.yaml run=runs/FOLDER",
    ),
    Verb(
        ("analyze", "features"),
        verbs.analyze_features,
        "dormant units, ranks, norms, step sizes",
        "configs/analyze/features.yaml run=runs/FOLDER",
    ),
    Verb(
        ("launch",),
        verbs.launch,
        "start a command on many GPUs, after checking them",
        "pretrain configs/runs/llama2-4b-20x.yaml --hostfile hostfile",
        "command and config",
        _launch_options,
    ),
    Verb(
        ("mlflow", "sync"), verbs.mlflow_sync, "bring MLflow up to date with a run or study folder", "runs/quickstart", "folder"
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 if all went well, 1 if runs of a study failed or `doctor` found this machine wanting, 2 for bad
    input, 128 + signal if interrupted; 73, 75 and 78 are those of `errors.py`."""
    parsed = _parsed(arguments)
    raise_interrupted_on_signals()
    try:
        sys.exit(parsed.run(parsed) or 0)
    except UserError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "megatron_plasticity"):
            raise  # a mistake of ours
        _complain(
            f"this command needs the package {package!r}, which is not installed; `pip install {package}` brings it "
            "(docs/install.md, also for machines without a network)"
        )
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        _complain("stopped by Ctrl-C; run the same command again to go on")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has left (`… | head`); nothing is wrong. Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; settings may stand after options as well, which argparse by itself does not understand."""
    parser = _parser()
    parsed, unknown = parser.parse_known_args(arguments)
    if hasattr(parsed, "overrides"):
        parsed.overrides += [argument for argument in unknown if not argument.startswith("-")]
        unknown = [argument for argument in unknown if argument.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return parsed


def _complain(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"error: {message}" if rank == "0" else f"error (rank {rank}): {message}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {' '.join(verb.words):21} {verb.summary}" for verb in VERBS]
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Which weight decay to pretrain with: studies of language-model plasticity.",
        epilog="commands:\n" + "\n".join(lines) + f"\n\nstart here:\n  {PROGRAM} study run configs/studies/quickstart.yaml\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{PROGRAM} COMMAND …  ({PROGRAM} COMMAND --help for more; --version)",
        add_help=False,  # the usage says it, and the list of commands needs the screen
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    top = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, prog=PROGRAM, help=argparse.SUPPRESS)
    for verb in VERBS:
        if len(verb.words) == 1:
            parent = top
        else:
            if verb.words[0] not in groups:
                group = top.add_parser(verb.words[0])
                groups[verb.words[0]] = group.add_subparsers(
                    dest="subcommand", metavar="COMMAND", required=True, prog=f"{PROGRAM} {verb.words[0]}"
                )
            parent = groups[verb.words[0]]
        _add(parent, verb)
    return parser


def _add(parent: argparse._SubParsersAction[argparse.ArgumentParser], verb: Verb) -> None:
    example = " ".join((PROGRAM, *verb.words, verb.example)).rstrip()
    what = "option and setting" if verb.words[0] == "launch" else "setting"
    own_page = {"tasks": "docs/tasks.md", "doctor": "docs/doctor.md", "launch": "docs/cluster.md"}
    reference = own_page.get(verb.words[0], "docs/config.md")
    command = parent.add_parser(
        verb.words[-1],
        help=verb.summary,
        description=verb.summary[0].upper() + verb.summary[1:] + ".",
        epilog=f"example:\n  {example}\n\nEvery {what} is described in {reference}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=verb.run)
    if verb.takes == "folder":
        command.add_argument("folder", type=Path, metavar="FOLDER", help="run folder or study folder")
        if verb.options is not None:
            verb.options(command)
        return
    if verb.takes == "options":
        assert verb.options is not None
        verb.options(command)
        return
    if verb.takes == "command and config":
        command.add_argument("verb", choices=LAUNCHED, help=argparse.SUPPRESS)
    if verb.takes == "source":
        command.add_argument("source", metavar="SOURCE", help="YAML file, Hugging Face folder, or name on its hub")
    else:
        either = ", or run folder to take with the defaults" if verb.takes == "config or folder" else ""
        command.add_argument("config", type=Path, metavar="CONFIG", help=f"YAML file{either}")
    command.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="settings that replace the file's")
    if verb.options is not None:
        verb.options(command)
    command.add_argument("--dry-run", action="store_true", help="check the config, print what would happen, and stop")
