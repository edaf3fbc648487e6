"""A run folder from a model that was pretrained elsewhere: everything that reads a pretraining run reads it as well.

    import-<name>-<hash>/
        config.yaml, inputs.json, state.json, results.json
        checkpoints/step-0/     fp32 weights without AdamW's moments
        tokenizer.json

Weights are kept only once their logits have been compared with those of transformers' model (`parity.py`).
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_plasticity.config.files import write_text_atomic
from megatron_plasticity.config.interchange import ImportConfig
from megatron_plasticity.data.prepare import TOKENIZER_FILE
from megatron_plasticity.errors import UserError
from megatron_plasticity.interchange.parity import check_parity
from megatron_plasticity.interchange.sources import Source, find_source
from megatron_plasticity.models.checkpoint import WEIGHTS, open_checkpoint, save_checkpoint
from megatron_plasticity.models.sizes import parameter_count
from megatron_plasticity.tracking.disk import explain_disk_errors
from megatron_plasticity.tracking.plain_types import section_to_yaml
from megatron_plasticity.tracking.progress import Both, FolderProgress, Progress
from megatron_plasticity.tracking.run_folder import RunFolder

# Weights wait under this name, where nothing looks for a checkpoint, until the parity check has passed.
_UNCHECKED = "unchecked"
_CHECKPOINT = "checkpoints/step-0"


def import_model(config: ImportConfig, progress: Progress) -> RunFolder:
    """Import the model that `config` names (or do nothing if that is done); returns its run folder.

    Raises UserError before anything is written if the source cannot be imported. If the logits of the two sides differ the run is
    marked as failed, and no weights are left.
    """
    source = find_source(config)
    folder = import_folder(config, source)
    if folder.is_done:
        _bring_up_to_date(config, source, folder)
        return folder
    with folder.running():
        folder.mark_done(_import(config, source, folder, Both(progress, FolderProgress(folder))))
    return folder


def import_folder(config: ImportConfig, source: Source) -> RunFolder:
    """The run folder of this import, made if it is not there."""
    return RunFolder.create(config.output, "import", config.name, config, source.inputs)


def imported_tensors(source: Source, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """Pairs of canonical name and fp32 tensor, one at a time; every stored number is kept exactly. UserError where one is not
    finite."""
    for done, (ours, theirs) in enumerate(source.names.items(), start=1):
        tensor = source.weights[theirs].to(torch.float32)
        if not tensor.isfinite().all():
            raise UserError(f"{source.path}: {theirs} holds numbers that are not finite, so the model computes nothing")
        yield ours, tensor
        progress.update(done, len(source.names), "tensors")


def _import(config: ImportConfig, source: Source, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    unchecked = folder.path / _UNCHECKED
    trainer = {"step": 0, "imported_from": config.source, "identity": source.identity}
    try:
        with explain_disk_errors(folder.path):
            save_checkpoint(unchecked, source.model, trainer, {WEIGHTS: imported_tensors(source, progress)})
        receipt = check_parity(open_checkpoint(unchecked, verify=False), source.path) if config.parity else None
        source.tokenizer.save(folder.path / TOKENIZER_FILE)
        _publish(unchecked, folder.path / _CHECKPOINT)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    count = parameter_count(source.model)
    return {
        "checkpoint": _CHECKPOINT,
        "source": config.source,
        "identity": source.identity,
        "stored_as": dict(Counter(source.weights.dtypes[theirs] for theirs in source.names.values())),
        "parameters": {"total": count.total, "non_embedding": count.non_embedding},
        "parity": receipt,
        **_labels(config),
    }


def _publish(checked: Path, checkpoint: Path) -> None:
    # One is there if an earlier attempt was killed right after this step.
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.parent.mkdir(exist_ok=True)
    os.replace(checked, checkpoint)


def _labels(config: ImportConfig) -> dict[str, Any]:
    return {"weight_decay": config.weight_decay, "tokens": config.tokens}


def _bring_up_to_date(config: ImportConfig, source: Source, folder: RunFolder) -> None:
    """Corrected labels, and a receipt that was skipped the first time; where it fails, as in a first import, nothing is kept."""
    results = folder.results
    receipt = results["parity"]
    if receipt is None and config.parity:
        checkpoint = open_checkpoint(folder.path / _CHECKPOINT)
        with folder.lock():
            try:
                receipt = check_parity(checkpoint, source.path)
            except UserError as error:
                # In this order: killed in between, it leaves a failed run, and never one that is done.
                folder.revoke(error)
                shutil.rmtree(checkpoint.path, ignore_errors=True)
                raise
    current = {**results, **_labels(config), "parity": receipt}
    if current != results or folder.config != config:
        with folder.lock():
            write_text_atomic(folder.path / "config.yaml", section_to_yaml(config))
            folder.mark_done(current)
