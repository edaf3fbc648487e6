"""Overfitting: held-out loss minus loss on sequences that the run did consume, both at its final weights.

On "paired". A gap of 1e-3 to 1e-2 nats calls for a paired bootstrap, but within one model nothing can be paired: the
held-out and the seen sequences are different texts, so both sides are resampled independently here. What is paired is the
comparison of two runs of a λ grid: with the same data seed and recipe they are measured on the very same sequences of both sides,
so the difficulty of the texts cancels in the *difference* of their gaps, which is therefore known better than the interval of
either gap suggests. `analysis/paired_losses.py` computes that from the losses of the single sequences, which the results keep.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_plasticity.analysis.bootstrap import interval, resampled_means
from megatron_plasticity.analysis.document_losses import DocumentLosses, document_gap
from megatron_plasticity.analysis.losses import mean_losses, token_losses
from megatron_plasticity.config.analysis import OverfittingRecipe
from megatron_plasticity.data.blocks import BlockReader
from megatron_plasticity.data.ledger import Ledger, draw_consumed_blocks
from megatron_plasticity.errors import UserError
from megatron_plasticity.models.transformer import Transformer
from megatron_plasticity.tracking.progress import Progress

_DECILES = 10


def run_overfitting(
    model: Transformer,
    seen: BlockReader,
    held_out: BlockReader,
    ledger: Ledger,
    store_sha256: str,
    recipe: OverfittingRecipe,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Gap of a model whose run consumed what `ledger` says of `seen`; results as in `gap`, `by_document` as in `document_gap`.

    The seen sequences are drawn uniformly from the different blocks that the run consumed, the same number from each decile (up
    to one), so that the deciles partition the draw. The draw depends on the ledger and the recipe's seed alone: it is the same
    for every λ.

    Raises:
        UserError: the store is not the one that the run consumed, or the run consumed nothing.
    """
    shares = [recipe.sequences * (d + 1) // _DECILES - recipe.sequences * d // _DECILES for d in range(_DECILES)]
    drawn = [
        draw_consumed_blocks(ledger, store_sha256, count, recipe.seed + decile, decile) for decile, count in enumerate(shares)
    ]
    seen_blocks = np.concatenate(drawn)
    if not seen_blocks.size:
        raise UserError("the run has consumed no sequence yet: there is nothing that it could have overfitted to")
    deciles = np.repeat(np.arange(_DECILES), [len(blocks) for blocks in drawn])
    generator = np.random.default_rng(recipe.seed)
    held_out_blocks = np.sort(generator.choice(len(held_out), size=min(recipe.sequences, len(held_out)), replace=False))

    total = len(seen_blocks) + len(held_out_blocks)
    by_sequence: list[np.ndarray] = []
    by_document: list[DocumentLosses] = []
    done = 0
    for reader, blocks in ((seen, seen_blocks), (held_out, held_out_blocks)):
        documents = DocumentLosses(reader)
        sequences: list[float] = []
        for losses, is_target in token_losses(model, reader, blocks, recipe.batch_size, device):
            for block, row in zip(blocks[len(sequences) :], losses, strict=False):
                documents.add(int(block), row)
            sequences += mean_losses(losses, is_target).tolist()
            done += len(losses)
            if progress is not None:
                progress.update(done, total, "sequences")
        by_sequence.append(np.array(sequences))
        by_document.append(documents)
    resamples, seed, blocks = recipe.bootstrap_resamples, recipe.seed, (seen_blocks, held_out_blocks)
    found = gap(by_sequence[0], by_sequence[1], deciles, resamples, seed, blocks)
    documents_gap = document_gap(by_document[0], by_document[1], resamples, seed)
    return {**found, **({} if documents_gap is None else {"by_document": documents_gap}), "passes": ledger.passes}


def gap(
    seen: np.ndarray,
    held_out: np.ndarray,
    deciles: np.ndarray,
    resamples: int = 1000,
    seed: int = 42,
    blocks: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """mean(held_out) − mean(seen) in nats per token, with a 95 % bootstrap interval, overall and by when a sequence was seen.

    Args:
        seen: mean loss of each seen sequence [n].
        held_out: mean loss of each held-out sequence [m].
        deciles: for each seen sequence, the tenth of the run's first pass over the data (0 to 9) in which it was seen [n].
        blocks: block in the store of each seen [n] and each held-out sequence [m], kept as `seen_blocks` and `held_out_blocks`
            so that a comparison over λ can tell that it compares the same sequences.

    The unit of the bootstrap is the sequence, since the tokens of one are correlated; the two sides are resampled independently
    (see the module's text). Entry d of `by_decile` compares decile d with all held-out sequences; it is null where no sequence
    was seen, and has no interval where only one was. `seen_losses` and `held_out_losses` are the losses of the sequences, to six
    decimals.

    Source: the gap is a claim of Han et al. (2602.11137); the draw, the resampling and the deciles are our own.
    """
    if not (np.isfinite(seen).all() and np.isfinite(held_out).all()):
        raise UserError(
            "the model's loss is not finite on some sequences: its weights have diverged, so there is no gap to measure"
        )
    generator = np.random.default_rng(seed)
    held_out_means = resampled_means(held_out, resamples, generator)

    def compared(side: np.ndarray) -> dict[str, float] | None:
        if not side.size:
            return None
        value = float(held_out.mean() - side.mean())
        if side.size == 1 or held_out.size == 1:
            return {"value": value}
        return interval(value, held_out_means - resampled_means(side, resamples, generator))

    result = {
        "held_out_loss": float(held_out.mean()),
        "seen_loss": float(seen.mean()),
        "gap": compared(seen),
        "sequences": int(seen.size),
        "held_out_sequences": int(held_out.size),
        "by_decile": [compared(seen[deciles == decile]) for decile in range(_DECILES)],
        "seen_losses": [round(float(loss), 6) for loss in seen],
        "held_out_losses": [round(float(loss), 6) for loss in held_out],
    }
    if blocks is not None:
        result["seen_blocks"], result["held_out_blocks"] = ([int(block) for block in side] for side in blocks)
    return result
