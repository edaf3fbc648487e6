"""The evaluations, each from its config to its run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_plasticity.config.evaluation import EvaluateConfig, HarnessConfig
from megatron_plasticity.evaluation.evaluate import evaluate_model
from megatron_plasticity.evaluation.inputs import evaluation_inputs
from megatron_plasticity.evaluation.kept_responses import KeptResponses
from megatron_plasticity.evaluation.samples import SAMPLES_FILE, write_samples
from megatron_plasticity.evaluation.sampling import Generator
from megatron_plasticity.parallel.grid import ProcessGrid, launched_processes, process_grid, resolve_device
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.progress import Progress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel, folder_on_model, run_on_model


def evaluate(config: EvaluateConfig, progress: Progress) -> RunFolder:
    """Evaluate the model at `config.run` (or do nothing if that is done); every response is kept in `samples.parquet`.

    Every process of a launch calls it: each has the whole model, and answers its share of the questions.
    """
    device = resolve_device(config.device)
    with _data_parallel(device) as grid:

        def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
            tokenizer, context_length = trained.tokenizer(), trained.checkpoint.model.context_length

            def generator() -> Generator:
                return _generator(config, trained, grid, show)

            kept = KeptResponses(folder.path)
            with explain_disk_errors(folder.path), grid.liveness.explained():
                results, samples = evaluate_model(generator, tokenizer, context_length, config, config.tasks, grid, show, kept)
                if grid.is_main:
                    write_samples(folder.path / SAMPLES_FILE, samples)
                    kept.remove()
            return results

        return run_on_model("evaluate", config, work, progress, evaluation_inputs(config, config.tasks), grid)


def evaluation_folder(config: EvaluateConfig) -> RunFolder:
    """The run folder of this config, made if it is not there."""
    return folder_on_model("evaluate", config, TrainedModel.open(config.run), evaluation_inputs(config, config.tasks))


def harness(config: HarnessConfig, progress: Progress) -> RunFolder:
    """Ask the model at `config.run` tasks of lm-evaluation-harness (or do nothing if that is done)."""
    # Named here, not at the top: the harness is an extra, and takes seconds to import.
    from megatron_plasticity.evaluation.lm_eval import NativeModel, evaluate_tasks, harness_inputs, special_ids

    def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
        model = trained.checkpoint.build_model(resolve_device(config.device))
        special = special_ids(trained.tokenizer_path)
        return evaluate_tasks(NativeModel(model, trained.tokenizer(), config.batch_size, special, show), config)

    return run_on_model("harness", config, work, progress, harness_inputs(config))


@contextlib.contextmanager
def _data_parallel(device: torch.device) -> Iterator[ProcessGrid]:
    """The grid of this launch. Without a launcher nothing is joined, which saves seconds."""
    if launched_processes() == 1:
        yield ProcessGrid(data_rank=0, data_size=1, device=device)
        return
    with process_grid(device) as grid:
        yield grid


def _generator(config: EvaluateConfig, trained: TrainedModel, grid: ProcessGrid, progress: Progress) -> Generator:
    """What `config.backend` names. A collective: vLLM reads a Hugging Face folder, which the main process writes."""
    if config.backend == "native":
        from megatron_plasticity.evaluation.sampler import NativeGenerator

        model = trained.checkpoint.build_model(grid.device)
        return NativeGenerator(model, trained.tokenizer(), config.batch_size, config.compile)
    from megatron_plasticity.evaluation.vllm_backend import VllmGenerator, check_supported
    from megatron_plasticity.interchange.exporting import default_output, export_model

    check_supported(trained.checkpoint.model)
    export = default_output(trained, "bfloat16")
    if grid.is_main and not (export / "config.json").is_file():
        export_model(trained.checkpoint.path, export, progress, "bfloat16")
    grid.barrier()
    return VllmGenerator(export)
