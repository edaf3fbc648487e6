"""What each command does. Everything heavy is imported inside the function that needs it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_plasticity.config.base import Section
    from megatron_plasticity.study.runner import StudyOutcome
    from megatron_plasticity.tracking.progress import Progress
    from megatron_plasticity.tracking.run_folder import RunFolder


def data_prepare(arguments: Namespace) -> None:
    """Build the corpus of a config, or do nothing if it is there."""
    from megatron_plasticity.config.data import CorpusConfig
    from megatron_plasticity.config.load import load_config
    from megatron_plasticity.data.prepare import prepare, prepared_folder, read_manifest

    config = load_config(CorpusConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        _print_config(config)
        print(f"would be written to {prepared_folder(config)}")
        return
    with _console("corpus") as progress:
        folder = prepare(config, progress)
    splits = read_manifest(folder)["splits"]
    for name, counts in splits.items():
        print(f"{name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    print(folder)


def data_show(arguments: Namespace) -> None:
    """Print the sequences that a pretraining run saw at a step, document by document."""
    from megatron_plasticity.config.training import PretrainConfig
    from megatron_plasticity.data.prepare import TOKENIZER_FILE
    from megatron_plasticity.data.stream import corpus_hash
    from megatron_plasticity.data.tokenizer import Tokenizer
    from megatron_plasticity.data.viewer import page, samples_of_step
    from megatron_plasticity.errors import UserError
    from megatron_plasticity.tracking.run_folder import RunFolder

    run = RunFolder.containing(arguments.folder)
    config = run.config
    if not isinstance(config, PretrainConfig):
        raise UserError(f"{arguments.folder}: not a pretraining run; only those read a corpus step by step")
    if not 1 <= arguments.step <= config.total_steps:
        raise UserError(f"--step {arguments.step}: this run has steps 1 to {config.total_steps}")
    if arguments.sequences is not None and arguments.sequences < 1:
        raise UserError(f"--sequences {arguments.sequences}: expected at least 1")
    if (found := corpus_hash(config.data)) != (read := run.inputs["corpus"]):
        folders = ", ".join(str(folder) for folder in (config.data.folder, *(corpus.folder for corpus in config.data.blend)))
        raise UserError(
            f"{run.path}: read the corpus {read[:12]}…, but {folders} now holds {found[:12]}…: prepare the old corpus again, or "
            "let the link lead to its folder, whose manifest.json has the first number as its sha256"
        )
    batch_size = config.batch.global_batch_size
    length = config.model.context_length
    samples = samples_of_step(config.data, length, batch_size, arguments.step, arguments.sequences)
    tokenizer = Tokenizer.load(config.data.folder / TOKENIZER_FILE)
    print(f"step {arguments.step:,} of {config.total_steps:,}: {batch_size} sequences of {length} + 1 tokens")
    for line in page(samples, tokenizer, arguments.ids):
        print(line)


def tasks_prepare(arguments: Namespace) -> None:
    """Prepare tasks, one after the other."""
    from megatron_plasticity.errors import UserError
    from megatron_plasticity.evaluation.tasks.catalogue import find_task_files, load_task_file
    from megatron_plasticity.evaluation.tasks.pages import preparation_page
    from megatron_plasticity.evaluation.tasks.prepare import find_origins, prepare_task

    tasks = {path: load_task_file(path) for path in find_task_files(arguments.tasks)}
    if arguments.source is not None and not arguments.source.is_dir():
        raise UserError(f"--from {arguments.source}: no such folder")
    origins = {path: find_origins(task, arguments.source, str(path)) for path, task in tasks.items()}
    for path, task in tasks.items():
        if arguments.dry_run:
            print(f"{task.name} would be written to {arguments.output / task.name}-HASH")
            for where, (_, origin) in origins[path].items():
                print(f"  {where}: {', '.join(origin.described.get('files', [])) or origin.described['hub']}")
            continue
        with _console(task.name) as progress:
            folder, manifest = prepare_task(task, arguments.source, arguments.output, str(path), arguments.strict, progress)
        for line in preparation_page(folder, manifest):
            print(line)


def tasks_list(arguments: Namespace) -> None:
    """Print all tasks and suites."""
    from megatron_plasticity.evaluation.tasks.pages import list_page

    for line in list_page(arguments.folder):
        print(line)


def tasks_show(arguments: Namespace) -> None:
    """Print examples of a task."""
    from megatron_plasticity.config.tasks import TaskConfig
    from megatron_plasticity.config.training import FinetuneRecipe
    from megatron_plasticity.evaluation.tasks.pages import examples_page

    config = TaskConfig(name=arguments.task, folder=arguments.folder)
    template = FinetuneRecipe.model_fields["template"].default
    for line in examples_page(config, arguments.side, arguments.number, template):
        print(line)


def plan(arguments: Namespace) -> None:
    """Print what a pretraining run needs on some numbers of GPUs, and how to lay it out. Nothing is started."""
    from megatron_plasticity.config.deepspeed import check_engine
    from megatron_plasticity.config.load import load_config
    from megatron_plasticity.config.training import PretrainConfig
    from megatron_plasticity.errors import UserError
    from megatron_plasticity.launch.hardware import Hardware, Links, device_named
    from megatron_plasticity.launch.plan import Machine, assumptions_page, plan_page

    if arguments.assumptions and arguments.mfu is not None:
        raise UserError("--assumptions: with --mfu nothing is predicted from them; leave one of the two out")
    hardware = Hardware(device_named(arguments.gpu), Links(arguments.gpus_per_node, arguments.network))
    memory = hardware.device.gibibytes if arguments.memory is None else arguments.memory
    machine = Machine(memory, hardware=hardware) if arguments.mfu is None else Machine(memory, arguments.mfu)
    config = load_config(PretrainConfig, arguments.config, arguments.overrides)
    check_engine(config, config.parallel.model_parallel_size)
    page = plan_page(config, arguments.gpus, machine)
    print(page + ("\n" + assumptions_page(hardware) if arguments.assumptions else ""), end="")


def pretrain(arguments: Namespace) -> None:
    """Pretrain one model."""
    from megatron_plasticity.config.deepspeed import check_engine
    from megatron_plasticity.config.load import load_config
    from megatron_plasticity.config.training import PretrainConfig
    from megatron_plasticity.models.sizes import parameter_count

    config = load_config(PretrainConfig, arguments.config, arguments.overrides)
    check_engine(config, config.parallel.model_parallel_size)
    if arguments.dry_run:
        count = parameter_count(config.model)
        timescale = config.adamw_timescale
        _print_config(config)
        print(f"parameters: {count.total:,} ({count.non_embedding:,} without embeddings)")
        print(
            f"steps: {config.total_steps:,} of {config.tokens_per_step:,} tokens, "
            f"{config.total_steps * config.tokens_per_step:,} in all"
        )
        print(
            f"weight decay: {config.weight_decay:g}, "
            f"AdamW timescale {'∞' if timescale is None else f'{timescale:.3g}'} of the run"
        )
        return
    from megatron_plasticity.parallel.grid import launched_processes
    from megatron_plasticity.training.preflight import check_pretraining
    from megatron_plasticity.training.pretrain import pretrain, pretrain_folder

    check_engine(config, launched_processes())
    check_pretraining(config)
    with _mirrored(lambda: pretrain_folder(config), config.logging.mlflow), _console(config.name) as progress:
        folder = pretrain(config, progress)
    _finish(folder, ("held_out_loss", "seen_loss", "train_loss"))


def doctor(arguments: Namespace) -> int:
    """Print a page about this machine; 1 if training cannot work here as it should."""
    import time

    from megatron_plasticity.launch.doctor.examine import examine
    from megatron_plasticity.launch.doctor.findings import problems
    from megatron_plasticity.launch.doctor.page import document, page

    started = time.perf_counter()
    facts = examine()
    if arguments.json:
        print(json.dumps(document(facts), indent=2, ensure_ascii=False))
    else:
        print("\n".join(page(facts, time.perf_counter() - started)))
    return 1 if problems(facts) else 0


def launch(arguments: Namespace) -> int:
    """Start a command on many processes; its exit code."""
    from megatron_plasticity.errors import UserError
    from megatron_plasticity.launch.job import LaunchedJob
    from megatron_plasticity.launch.machines import Machines
    from megatron_plasticity.launch.slurm import SlurmRequest, parse_options
    from megatron_plasticity.launch.start import Options, launch, launch_on_slurm

    ways = {
        "--hostfile": ("include", "exclude", "master_addr", "env"),
        "--slurm": ("nodes", "gpus_per_node", "time", "partition", "account", "sbatch", "setup"),
    }
    chosen = "--hostfile" if arguments.hostfile is not None else "--slurm" if arguments.slurm else "--local"
    stray = [(name, way) for way, names in ways.items() if way != chosen for name in names if getattr(arguments, name)]
    if chosen == "--slurm" and arguments.master_port:
        stray.append(("master_port", "--hostfile or --local"))
    if stray:
        raise UserError("\n".join(f"--{name.replace('_', '-')} goes with {way}, not with {chosen}" for name, way in stray))
    seconds = arguments.all_reduce_seconds
    if not seconds >= 10:
        raise UserError(f"--all-reduce-seconds {seconds:g}: expected at least 10")
    options = Options(arguments.logs, tuple(arguments.env), not arguments.skip_preflight, arguments.dry_run, seconds)
    job = LaunchedJob.load(arguments.verb, arguments.config, arguments.overrides)
    if chosen == "--slurm":
        for name in ("nodes", "gpus_per_node"):
            if (number := getattr(arguments, name)) is not None and number < 1:
                raise UserError(f"--{name.replace('_', '-')} {number}: expected at least 1")
        if arguments.gpus_per_node is None:
            raise UserError("--slurm needs --gpus-per-node; `megatron-plasticity plan` says how many GPUs a run wants")
        named = [(name, getattr(arguments, name)) for name in ("time", "partition", "account") if getattr(arguments, name)]
        extra = (*named, *parse_options(arguments.sbatch))
        gpus, setup = job.config.device != "cpu", tuple(arguments.setup)
        request = SlurmRequest(arguments.nodes or 1, arguments.gpus_per_node, gpus, extra, setup)
        return launch_on_slurm(job, request, options)
    port: int | None = arguments.master_port
    if arguments.hostfile is not None:
        machines = Machines.of_hostfile(arguments.hostfile, arguments.include, arguments.exclude, arguments.master_addr, port)
    else:
        machines = Machines.local(arguments.local, port, gpus=job.config.device != "cpu")
    return launch(job, machines, options)


def import_hf(arguments: Namespace) -> None:
    """Import a model from a Hugging Face folder, or from the hub, into a run folder."""
    from megatron_plasticity.config.interchange import import_config
    from megatron_plasticity.interchange.sources import find_source
    from megatron_plasticity.models.sizes import parameter_count

    config = import_config(arguments.source, arguments.overrides)
    if arguments.dry_run:
        source = find_source(config)
        _print_config(config)
        print(f"parameters: {parameter_count(source.model).total:,}")
        return
    from megatron_plasticity.interchange.importing import import_model

    with _console(f"import {config.name}") as progress:
        folder = import_model(config, progress)
    _print_parity(folder.results["parity"])
    print(folder.path)


def export_hf(arguments: Namespace) -> None:
    """Write the model of a run or checkpoint folder as a Hugging Face folder."""
    import json

    from megatron_plasticity.interchange.exporting import export_model
    from megatron_plasticity.interchange.parity import PARITY_FILE

    with _console(f"export {arguments.folder.name}") as progress:
        output = export_model(arguments.folder, arguments.output, progress, arguments.dtype, arguments.parity)
    _print_parity(json.loads((output / PARITY_FILE).read_text(encoding="utf-8")) if arguments.parity else None)
    print(output)


def _print_parity(receipt: dict[str, Any] | None) -> None:
    if receipt is None:
        print("not compared with transformers' model")
        return
    print(f"logits as transformers' to {receipt['max_difference']:.2g}, mean KL {receipt['mean_kl']:.2g} nats")


def finetune(arguments: Namespace) -> None:
    """Fine-tune a model on one task."""
    from megatron_plasticity.config.deepspeed import check_engine
    from megatron_plasticity.config.load import load_config
    from megatron_plasticity.config.training import FinetuneConfig

    config = load_config(FinetuneConfig, arguments.config, arguments.overrides)
    check_engine(config, config.parallel.model_parallel_size)
    if arguments.dry_run:
        _print_config(config)
        return
    from megatron_plasticity.parallel.grid import launched_processes
    from megatron_plasticity.tracking.trained_model import TrainedModel
    from megatron_plasticity.training.finetune import finetune, finetune_folder
    from megatron_plasticity.training.preflight import check_finetuning

    check_engine(config, launched_processes())

    def folder_of_run() -> RunFolder:
        base = TrainedModel.open(config.base)
        check_finetuning(config, base.checkpoint.model)
        return finetune_folder(config, base)

    with _mirrored(folder_of_run, config.logging.mlflow), _console(config.name) as progress:
        folder = finetune(config, progress)
    _finish(folder, ("train_loss",))


def evaluate(arguments: Namespace) -> None:
    """Evaluate a model and print its scores."""
    from megatron_plasticity.config.evaluation import EvaluateConfig

    folder = _run_job("evaluate", EvaluateConfig, arguments)
    if folder is None or os.environ.get("RANK", "0") != "0":
        return
    for task, scores in folder.results["tasks"].items():
        test_sets = scores["test_sets"]
        print(f"{task} ({scores['questions']} questions, chance {scores['chance']:.0%})")
        _print_metrics(scores["metrics"])
        for name, part in test_sets.items():
            if len(test_sets) > 1:
                print(f"  {name} ({part['questions']} questions, chance {part['chance']:.0%})")
                _print_metrics(part["metrics"], "    ")
            for group, means in part.get("groups", {}).items():
                print(f"    {group} ({means['questions']:.0f} questions): greedy {means['greedy']:.3f}")
            if missing := part.get("prompts_too_long"):
                print(f"    {missing} questions were not asked, since their prompts are too long: they count as wrong")
            if (other := part.get("other_rules")) and other["responses_that_differ"]:
                print(
                    f"    by the {'paper' if other['rules'] == 'paper' else 'own'} rules of grading greedy would be "
                    f"{other['metrics']['greedy']:.3f}: {other['responses_that_differ']} verdicts differ"
                )
    if arguments.show:
        from megatron_plasticity.evaluation.samples import page, read_samples

        for line in page(read_samples(folder.path, arguments.show)):
            print(line)
    print(folder.path)


def _print_metrics(metrics: dict[str, Any], margin: str = "  ") -> None:
    for name, metric in metrics.items():
        interval = f"  [{metric['low']:.3f}, {metric['high']:.3f}]" if metric.get("low") is not None else ""
        print(f"{margin}{name:14} {metric['value']:.3f}{interval}")


def lm_eval(arguments: Namespace) -> None:
    """Ask a model tasks of lm-evaluation-harness and print its scores."""
    from megatron_plasticity.config.evaluation import HarnessConfig

    folder = _run_job("harness", HarnessConfig, arguments)
    if folder is None:
        return
    for task, scores in folder.results["tasks"].items():
        for name, score in scores.items():
            print(f"{task:24} {name:14} {score['value']:.4f}" + (f" ± {score['stderr']:.4f}" if "stderr" in score else ""))
    print(folder.path)


def capture(arguments: Namespace) -> None:
    """Dump activations of a model and print what was kept."""
    from megatron_plasticity.config.analysis import model_capture_config

    config = model_capture_config(arguments.config, arguments.overrides, arguments.step)
    if arguments.dry_run:
        _print_config(config)
        return
    from megatron_plasticity.evaluation.capture_job import capture

    with _console(f"capture {config.name}") as progress:
        folder = capture(config, progress)
    results = folder.results
    print(f"step {results['step']}: {results['positions']:,} positions of {results['sequences']:,} sequences")
    for point, shape in results["shapes"].items():
        print(f"  {point:22} {' × '.join(map(str, shape))}")
    for point in results["statistics"]:
        print(f"  {point:22} statistics")
    print(f"{results['bytes'] / 2**20:,.1f} MiB")
    print(folder.path)


def analyze_probes(arguments: Namespace) -> None:
    """Probe a model and print the accuracy at each layer."""
    from megatron_plasticity.config.analysis import ProbesConfig

    folder = _run_job("probes", ProbesConfig, arguments)
    if folder is None:
        return
    for name, dataset in folder.results["datasets"].items():
        for variant, probes in dataset["variants"].items():
            print(f"{name}, {variant} (chance {dataset['chance']:.3f})")
            for point, accuracies in zip(probes["points"], probes["accuracy"], strict=True):
                print(f"  {point:22} {sum(accuracies) / len(accuracies):.3f}")
    print(folder.path)


def analyze_attention(arguments: Namespace) -> None:
    """Measure the attention matrices of a model and print their pseudo-ranks."""
    from megatron_plasticity.config.analysis import AttentionConfig

    folder = _run_job("attention", AttentionConfig, arguments)
    if folder is None:
        return
    results = folder.results
    print(f"mean pseudo-rank (95 % of Σσ) of head dimension {results['head_dim']}")
    for product, name in {"qk": "W_QK", "qk_folded": "W_QK with the QK-norm's gains", "vp": "W_VP"}.items():
        if f"{product}_pseudo_rank" in results["summary"]:
            print(f"  {name} {results['summary'][f'{product}_pseudo_rank']:.2f}")
    print(folder.path)


def analyze_truncation(arguments: Namespace) -> None:
    """Truncate the attention matrices of a model to ranks and print what that does to the loss."""
    from megatron_plasticity.config.analysis import TruncationConfig

    folder = _run_job("truncation", TruncationConfig, arguments)
    if folder is None:
        return
    results = folder.results
    print(f"loss {results['loss']:.4f}, of heads of dimension {results['head_dim']}")
    for target, ranks in results["targets"].items():
        print(f"W_{target.upper()} of rank    loss   random directions")
        for rank, entry in ranks.items():
            control = f"   {entry['control']['loss']:8.4f}" if "control" in entry else ""
            print(f"{rank:>12}{entry['truncated']['loss']:8.4f}{control}")
    print(folder.path)


def analyze_overfitting(arguments: Namespace) -> None:
    """Measure the train–validation gap of a pretraining run and print it."""
    from megatron_plasticity.config.analysis import OverfittingConfig

    folder = _run_job("overfitting", OverfittingConfig, arguments)
    if folder is None:
        return
    results = folder.results
    gap = results["gap"]
    print(f"held-out loss {results['held_out_loss']:.4f}, seen loss {results['seen_loss']:.4f}")
    print(f"gap {_with_interval(gap)}")
    if by_document := results.get("by_document"):
        sides = f"{by_document['seen_documents']:,} seen and {by_document['held_out_documents']:,} held-out documents"
        print(f"gap by document {_with_interval(by_document['gap'])}, of {sides}")
    print(folder.path)


def _with_interval(estimate: dict[str, float]) -> str:
    interval = f"  [{estimate['low']:.4f}, {estimate['high']:.4f}]" if "low" in estimate else ""
    return f"{estimate['value']:.4f}{interval}"


def analyze_features(arguments: Namespace) -> None:
    """Measure the features of a model, its weights and its training steps, and print their summary."""
    from megatron_plasticity.config.analysis import FeaturesConfig

    folder = _run_job("features", FeaturesConfig, arguments)
    if folder is None:
        return
    results = folder.results
    summary, final_norm = results["summary"], results["final_norm"]
    print(f"mean over layers, at {results['positions']:,} positions of {results['sequences']:,} sequences")
    for threshold, share in summary["dormant_units"].items():
        print(f"  units of the MLP dormant at τ = {threshold:5} {share:7.2%}")
    print(f"ranks of {results['hidden_size']:,} features   after the layers   after the final norm")
    for name, key in {"entropy rank": "entropy_rank", "srank": "srank", "stable rank": "stable_rank"}.items():
        for kind, label in {"uncentred": "", "centred": ", centred"}.items():
            print(f"  {name + label:22} {summary[kind][key]:14.1f} {final_norm[kind][key]:22.1f}")
    if (training := results["training"]) is not None:
        timescale = training["timescale"]["of_run"]
        print(f"AdamW timescale {'∞' if timescale is None else f'{timescale:.3g}'} of the run")
        for name, found in training["summary"].items():
            shown = [f"η/‖W‖ {found['effective_learning_rate'] or 0:.2e}", f"‖ΔW‖/‖W‖ {found['relative_update'] or 0:.2e}"]
            if found["over_equilibrium"] is not None:
                shown.append(f"{found['over_equilibrium']:.2f} times the equilibrium's")
            print(f"  {name:16} {', '.join(shown)}")
    print(folder.path)


def study_plan(arguments: Namespace) -> None:
    """Print the runs of a study, what they need, and what of them is done."""
    from megatron_plasticity.config.study import StudyConfig
    from megatron_plasticity.launch.plan import Machine
    from megatron_plasticity.study.plan_page import study_page

    machine = Machine(getattr(arguments, "memory", Machine.gibibytes), getattr(arguments, "mfu", Machine.mfu))
    print(study_page(_study_config(arguments, StudyConfig), machine), end="")


def study_run(arguments: Namespace) -> int:
    """Run a study; 1 if some of its runs failed."""
    from megatron_plasticity.config.study import StudyConfig

    if arguments.dry_run:
        study_plan(arguments)
        return 0
    config = _study_config(arguments, StudyConfig)
    from megatron_plasticity.study.runner import run_study

    return _tell_outcome(run_study(config))


def study_retry(arguments: Namespace) -> int:
    """Run those of a study's runs again that failed, or those that are named, and what needs them; 1 if some failed again."""
    from megatron_plasticity.study.again import cells_to_retry, config_of

    config = config_of(arguments.folder)
    cells = cells_to_retry(arguments.folder, arguments.cells)
    if not cells:
        print("no run of this study has failed")
        return 0
    from megatron_plasticity.study.runner import run_study

    return _tell_outcome(run_study(config, only=cells))


def study_cancel(arguments: Namespace) -> None:
    """Take a study's jobs out of Slurm's queue."""
    from megatron_plasticity.study.again import cancel

    cancelled = cancel(arguments.folder)
    for element in cancelled:
        print(f"cancelled: job {element}")
    print(
        f"{len(cancelled)} jobs were in the queue; those that ran were told to save, for which Slurm leaves them its KillWait "
        "(30 s unless set otherwise), and `megatron-plasticity study run` goes on from their latest checkpoints"
    )


def _tell_outcome(outcome: StudyOutcome) -> int:
    for cell, reason in outcome.failed.items():
        print(f"failed: {cell}: {reason}", file=sys.stderr)
    if outcome.not_started:
        print(f"not started, since what they need failed or is not done: {', '.join(outcome.not_started)}", file=sys.stderr)
    print(f"{len(outcome.done)} runs done, {len(outcome.failed)} failed, {len(outcome.not_started)} not started")
    print(f"next: megatron-plasticity study report {outcome.folder}")
    return 1 if outcome.failed or outcome.not_started else 0


def study_status(arguments: Namespace) -> None:
    """Print how far a study is, once or again and again."""
    from megatron_plasticity.study.status import read_status, show, watch

    if arguments.watch:
        watch(arguments.folder, arguments.all, arguments.seconds)
    elif arguments.json:
        print(json.dumps(read_status(arguments.folder).to_json(), indent=2))
    else:
        show(read_status(arguments.folder), arguments.all)


def study_report(arguments: Namespace) -> None:
    """Write the report of a study, print where it is, and which of the paper's statements its results bear out."""
    from megatron_plasticity.study.report import write_report
    from megatron_plasticity.study.report.assertion_table import terminal_lines

    page = write_report(arguments.folder).resolve()
    print(f"report: {page}")
    for line in terminal_lines(json.loads(page.with_name("report.json").read_text(encoding="utf-8"))):
        print(line)


def study_compare(arguments: Namespace) -> None:
    """Compare the groups of several studies, print where the page is, and whether the best λ moves from one to another."""
    from megatron_plasticity.study.report.comparison import write_comparison
    from megatron_plasticity.study.report.comparison.tables import terminal_lines

    page = write_comparison(arguments.folders, arguments.output, arguments.any_finetuning).resolve()
    print(f"comparison: {page}")
    for line in terminal_lines(json.loads(page.with_name("comparison.json").read_text(encoding="utf-8"))):
        print(line)


def mlflow_sync(arguments: Namespace) -> None:
    """Bring MLflow up to date with a run folder or a study folder."""
    from megatron_plasticity.tracking.mlflow_background import sync_patiently
    from megatron_plasticity.tracking.mlflow_mirror import MlflowMirror
    from megatron_plasticity.tracking.mlflow_store import without_credentials

    folder: Path = arguments.folder.resolve()
    # A study mirrors into its own folder, a single run into its output folder: as `study run` and `pretrain` do.
    root = folder if (folder / "study.json").is_file() else folder.parent
    mirror = MlflowMirror(root, experiment=root.name)
    sync_patiently(mirror, folder)
    print(f"{folder} is in MLflow at {without_credentials(mirror.uri)}")


def _study_config(arguments: Namespace, cls: Any) -> Any:
    """The study of the command line; --hostfile and --slurm stand for settings of `resources`."""
    from megatron_plasticity.config.load import load_config

    overrides = list(arguments.overrides)
    if arguments.hostfile is not None:
        overrides += ["resources.backend=hostfile", f"resources.hostfile={arguments.hostfile}"]
    if arguments.slurm:
        overrides += ["resources.backend=slurm", "resources.hostfile=null"]
    return load_config(cls, arguments.config, overrides)


def _run_job(kind: str, cls: type[Section], arguments: Namespace) -> RunFolder | None:
    """Load the config and do the job; None for a dry run, which prints the config."""
    from megatron_plasticity.config.load import load_config

    config = load_config(cls, arguments.config, arguments.overrides)
    if arguments.dry_run:
        _print_config(config)
        return None
    from megatron_plasticity.study.jobs import job_for

    with _console(f"{kind} {getattr(config, 'name', '')}".strip()) as progress:
        return job_for(kind)(config, progress)


def _print_config(config: Section) -> None:
    import yaml

    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None), end="")


@contextlib.contextmanager
def _console(description: str) -> Iterator[Progress]:
    """A progress bar on the first rank, silence on the others."""
    from megatron_plasticity.tracking.progress import ConsoleProgress, NoProgress

    if os.environ.get("RANK", "0") != "0":
        yield NoProgress()
        return
    with ConsoleProgress(description) as progress:
        yield progress


@contextlib.contextmanager
def _mirrored(folder_of_run: Any, wanted: bool) -> Iterator[None]:
    """Mirror a single training run to MLflow from the first rank while the block runs."""
    if not wanted or os.environ.get("RANK", "0") != "0":
        yield
        return
    from megatron_plasticity.tracking.mlflow_mirror import MlflowMirror, mirror_in_background

    folder: RunFolder = folder_of_run()
    output = folder.path.parent
    with mirror_in_background(MlflowMirror(output, experiment=output.resolve().name), folder.path):
        yield


def _finish(folder: RunFolder, numbers: tuple[str, ...]) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    results = folder.results
    for name in numbers:
        print(f"{name} {results[name]:.4f}")
    print(folder.path)
