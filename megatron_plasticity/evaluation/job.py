"""The evaluations, each from its config to its run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_plasticity.config.evaluation import EvaluateConfig, HarnessConfig
from megatron_plasticity.config.files import write_text_atomic
from megatron_plasticity.evaluation.evaluate import evaluate_model
from megatron_plasticity.parallel.grid import resolve_device
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.progress import Progress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel, run_on_model

SAMPLES_FILE = "samples.jsonl"


def evaluate(config: EvaluateConfig, progress: Progress) -> RunFolder:
    """Evaluate the model at `config.run` (or do nothing if that is done); every response is kept in `samples.jsonl`."""

    def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
        device = resolve_device(config.device)
        model = trained.checkpoint.build_model(device)
        results, samples = evaluate_model(model, trained.tokenizer(), config, config.tasks, device, show)
        with explain_disk_errors(folder.path):
            write_text_atomic(folder.path / SAMPLES_FILE, "".join(json.dumps(row) + "\n" for row in samples))
        return results

    return run_on_model("evaluate", config, work, progress)


def harness(config: HarnessConfig, progress: Progress) -> RunFolder:
    """Ask the model at `config.run` tasks of lm-evaluation-harness (or do nothing if that is done)."""
    # Named here, not at the top: the harness is an extra, and takes seconds to import.
    from megatron_plasticity.evaluation.lm_eval import NativeModel, evaluate_tasks, harness_inputs, special_ids

    def work(trained: TrainedModel, folder: RunFolder, show: Progress) -> Mapping[str, Any]:
        model = trained.checkpoint.build_model(resolve_device(config.device))
        special = special_ids(trained.tokenizer_path)
        return evaluate_tasks(NativeModel(model, trained.tokenizer(), config.batch_size, special, show), config)

    return run_on_model("harness", config, work, progress, harness_inputs(config))
