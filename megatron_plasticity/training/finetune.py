"""A fine-tuning run: the pretraining loop on prompt–response examples, with the loss on response tokens only."""

from __future__ import annotations

import logging
import shutil

from megatron_plasticity.capture.sequences import CapturedSequences
from megatron_plasticity.config.analysis import CaptureConfig
from megatron_plasticity.config.hashing import canonical
from megatron_plasticity.config.training import FinetuneConfig
from megatron_plasticity.data.prepare import TOKENIZER_FILE
from megatron_plasticity.data.sft import EncodedExamples, encode_examples
from megatron_plasticity.data.tokenizer import Tokenizer
from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.capture_sequences import choose_sequences
from megatron_plasticity.evaluation.tasks.prepared import overlap_warning
from megatron_plasticity.evaluation.tasks.registry import get_task
from megatron_plasticity.models.attention_choice import choose_attention
from megatron_plasticity.models.lora import Adapters
from megatron_plasticity.models.transformer import local_model
from megatron_plasticity.optim.adamw import check_adamw
from megatron_plasticity.parallel.grid import ProcessGrid, process_grid, resolve_device
from megatron_plasticity.tracking.progress import Both, FolderProgress, NoProgress, Progress
from megatron_plasticity.tracking.run_folder import RunFolder
from megatron_plasticity.tracking.trained_model import TrainedModel
from megatron_plasticity.training.activations import capture_inputs, capturing
from megatron_plasticity.training.batches import FinetuneBatches
from megatron_plasticity.training.preflight import check_compiler, check_finetuning
from megatron_plasticity.training.session import held, training_session

_log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig, progress: Progress) -> RunFolder:
    """Fine-tune (or go on, or do nothing if it is done); returns the run folder. Every rank of the launch calls it.

    Raises ConfigError for a config that cannot work on this base, before the run folder is made.
    """
    base = TrainedModel.open(config.base)
    check_finetuning(config, base.checkpoint.model)
    device = resolve_device(config.device)
    check_compiler(config.engine, device)
    with process_grid(device, config.parallel) as grid:
        # These raise before a folder is made, and touch the GPU, which the grid has set up.
        choose_attention(config.engine, base.checkpoint.model, config.parallel.tensor, grid.device)
        check_adamw(config, grid.device)
        if grid.is_main:
            finetune_folder(config, base)
        grid.barrier()
        folder = finetune_folder(config, base)
        if not folder.is_done:
            with held(folder, grid):
                _finetune(config, base, folder, grid, progress)
        return folder


def finetune_folder(config: FinetuneConfig, base: TrainedModel) -> RunFolder:
    """The run folder of this config, made if it is not there."""
    task = get_task(config.task).identity
    inputs = {"base": base.identity, **({"task": task} if task else {}), **capture_inputs(config.capture)}
    return RunFolder.create(config.output, "finetune", config.name, config, inputs)


def _finetune(config: FinetuneConfig, base: TrainedModel, folder: RunFolder, grid: ProcessGrid, progress: Progress) -> None:
    tokenizer = base.tokenizer()
    examples, without_response = _encoded(config, tokenizer)
    batches = FinetuneBatches(examples, config.epochs, config.batch, grid, config.seed, tokenizer.end_of_text, config.batching)
    weight_decay = config.optimizer.resolved_weight_decay(batches.steps)
    data_identity = {
        "base": base.identity,
        "task": canonical(config.task),
        "template": config.template,
        "max_length": config.max_length,
        "seed": config.seed,
        **({"task_sha256": identity} if (identity := get_task(config.task).identity) else {}),
        **({"lora": canonical(config.lora)} if config.lora else {}),
    }

    model = local_model(base.checkpoint.model, grid)
    weights = base.checkpoint.tensors()
    model.load_whole(weights)
    adapters = None
    if config.lora is not None:
        adapters = Adapters(config.lora, model.config, weights)
        adapters.attach(model, config.seed)
    with training_session(folder, "finetune", config, model, weight_decay, batches, data_identity, grid, adapters) as session:
        if grid.is_main:
            if (warning := overlap_warning(get_task(config.task))) is not None:
                _log.warning("%s", warning)
            session.announce()
            shutil.copyfile(base.tokenizer_path, folder.path / TOKENIZER_FILE)
        show = Both(progress, FolderProgress(folder)) if grid.is_main else NoProgress()

        def sequences(capture: CaptureConfig) -> CapturedSequences:
            length = base.checkpoint.model.context_length
            return choose_sequences(capture, tokenizer, length, task=config.task, template=config.template)

        with capturing(session, config.capture, sequences) as captures:
            session.run(captures, show)
        if grid.is_main:
            counts = {"examples": len(examples), "examples_without_response": without_response}
            folder.mark_done({**session.results(), **counts, "padding_share": batches.padding_share()})


def _encoded(config: FinetuneConfig, tokenizer: Tokenizer) -> tuple[EncodedExamples, int]:
    """Examples that have something to learn from, and the number of those whose prompt alone fills `max_length`."""
    examples = get_task(config.task).train(config.task.train_examples, config.task.seed)
    pairs = [(example.prompt, example.response) for example in examples]
    encoded = encode_examples(tokenizer, config.template, pairs, config.max_length)
    useful = EncodedExamples(example for example in encoded if example.response_length > 0)
    if not len(useful):
        raise UserError(f"task {config.task.name!r}: no prompt leaves room for a response within max_length={config.max_length}")
    return useful, len(pairs) - len(useful)
