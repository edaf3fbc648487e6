"""The parity receipt: logits of our model and of transformers' model on the same tokens.

Names and shapes that fit prove little: query rows in another order, a norm that was left out, or gate and up projections in each
other's place all load without a word. The logits tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_plasticity.errors import UserError
from megatron_plasticity.models.checkpoint import CheckpointFolder

PARITY_FILE = "parity.json"
SEQUENCES, LONGEST, SEED = 2, 128, 0
# Both sides compute in fp32, where the order of sums moves logits by 1e-6 to 1e-4 of their deviation, more in deeper models.
DIFFERENCE_TOLERANCE = 1e-3
KL_TOLERANCE = 1e-6


def check_parity(checkpoint: CheckpointFolder, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The receipt that the model of `checkpoint`, rounded to `dtype`, is the one that transformers loads from `folder`.

    Both run in fp32 on the CPU, one after the other, so that the memory is that of one model: 4 bytes per parameter, and 2 more
    while transformers reads a folder in bf16. Raises UserError, with the figures, beyond the tolerances, and where transformers
    misses a tensor or finds one too many.
    """
    tokens = probe_tokens(checkpoint.model.vocab_size, checkpoint.model.context_length)
    receipt = compare(native_logits(checkpoint, tokens, dtype), transformers_logits(folder, tokens))
    if not receipt["passed"]:
        raise UserError(
            f"{folder}: transformers' model and ours do not agree: their logits differ by up to {receipt['max_difference']:.3g}, "
            f"{receipt['relative_difference']:.3g} of their deviation (tolerance {DIFFERENCE_TOLERANCE:g}), mean KL "
            f"{receipt['mean_kl']:.3g} nats (tolerance {KL_TOLERANCE:g}). Nothing was kept; please report its config.json."
        )
    return receipt


def probe_tokens(vocab_size: int, context_length: int) -> Tensor:
    """The tokens on which logits are compared, int64 [2, up to 128], drawn uniformly by a fixed seed."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocab_size, (SEQUENCES, min(LONGEST, context_length)), generator=generator)


@torch.no_grad()
def native_logits(checkpoint: CheckpointFolder, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [B, S, V] in fp32 of our model with its weights rounded to `dtype`."""
    model = checkpoint.build_model(torch.device("cpu"))
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model(tokens)


@torch.no_grad()
def transformers_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] in fp32 of the model that transformers loads from `folder`. Code that the folder brings is never run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except MemoryError:  # says nothing about the folder
        raise
    except Exception as error:  # a config of the wrong types raises whatever its use comes to
        reason = " ".join([f"{type(error).__name__}:", *map(str.strip, str(error).strip().splitlines()[:3])])
        raise UserError(f"{folder}: transformers cannot load it: {reason}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    model, loading = loaded
    # What is missing would be drawn at random, in silence.
    wrong = [f"{what}: {', '.join(sorted(map(str, names))[:5])}" for what, names in loading.items() if names]
    if wrong:
        raise UserError(f"{folder}: transformers cannot load it as it is: {'; '.join(wrong)}")
    return model.eval()(tokens).logits


def compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """The receipt of two batches of logits [B, S, V]: largest difference, also relative to the deviation of the logits, and the
    mean over positions of KL(theirs ‖ ours) in nats; `passed` says whether both lie within the tolerances."""
    difference = (ours - theirs).abs().max().item()
    relative = difference / max(theirs.std().item(), torch.finfo(torch.float32).tiny)
    ours_log, theirs_log = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    kl = (theirs_log.exp() * (theirs_log - ours_log)).sum(-1).mean().item()
    return {
        # Written so that logits that are not finite do not pass.
        "passed": bool(relative <= DIFFERENCE_TOLERANCE and kl <= KL_TOLERANCE),
        "max_difference": difference,
        "relative_difference": relative,
        "mean_kl": kl,
        "tolerance": {"relative_difference": DIFFERENCE_TOLERANCE, "mean_kl": KL_TOLERANCE},
        "probe": {"sequences": ours.shape[0], "tokens": ours.shape[1], "seed": SEED},
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("torch", "transformers")}
