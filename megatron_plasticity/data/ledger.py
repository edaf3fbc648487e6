"""The ledger of a pretraining run: which blocks of which store it consumed, exactly.

The order of samples is a pure function of its seed (`data/order.py`), so the ledger is one interval [0, n) of sample indexes and
what pins the function down. The train–held-out gap is measured on blocks drawn from it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from megatron_plasticity.config.files import write_json_atomic
from megatron_plasticity.data.blend import BlendOrder
from megatron_plasticity.data.order import SampleOrder
from megatron_plasticity.errors import UserError

LEDGER_FILE = "ledger.json"
_DECILES = 10


@dataclass(frozen=True)
class Ledger:
    """Samples [0, consumed_samples) of the order over the blocks of one store, or of several that are blended."""

    seed: int
    """Seed of the order."""
    sequence_length: int
    """S; a block has S + 1 tokens."""
    number_of_blocks: int
    """Blocks of the store, or of all stores together, at this sequence length."""
    store_sha256: str
    """What identifies the corpus or corpora (`data/stream.py`): for one corpus its manifest's `sha256`."""
    consumed_samples: int
    """Samples consumed so far, over all epochs."""
    blend: tuple[tuple[int, float], ...] = ()
    """Blocks and weight of each corpus, if several are blended."""

    @property
    def distinct_blocks(self) -> int:
        """Number of different blocks read: the first epoch of a corpus visits each of its blocks once, later ones add none."""
        return self.order().distinct(self.consumed_samples)

    @property
    def passes(self) -> float:
        """How often the run went over its data, on average: above 1 it saw blocks again. In a blend a corpus with a large weight
        may have been repeated even below 1."""
        return self.consumed_samples / self.number_of_blocks

    def order(self) -> SampleOrder:
        """The order that the run followed."""
        if self.blend:
            return BlendOrder(self.blend, self.seed)
        return SampleOrder(self.number_of_blocks, self.seed)


def write_ledger(run_folder: Path, ledger: Ledger) -> None:
    """Replace `ledger.json` of a run folder in one step."""
    values = asdict(ledger)
    if not ledger.blend:
        del values["blend"]
    write_json_atomic(run_folder / LEDGER_FILE, values)


def read_ledger(run_folder: Path) -> Ledger:
    """Read `ledger.json`. Raises UserError when it is missing or damaged."""
    path = run_folder / LEDGER_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; only a pretraining run that reached a checkpoint has a ledger") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the ledger: {error}") from error
    expected = {field.name for field in fields(Ledger)} - {"blend"}
    blend = values.pop("blend", []) if isinstance(values, dict) else []
    if not isinstance(values, dict) or set(values) != expected:
        raise UserError(f"{path}: not a ledger; expected an object with the keys {', '.join(sorted(expected))}")
    numbers = expected - {"store_sha256"}
    if any(type(values[key]) is not int for key in numbers) or not isinstance(values["store_sha256"], str):
        raise UserError(f"{path}: damaged; store_sha256 must be a string and every other value a whole number")
    if values["sequence_length"] < 1 or values["number_of_blocks"] < 1 or values["consumed_samples"] < 0:
        raise UserError(f"{path}: damaged; it holds a length, a number of blocks or of samples that is out of range")
    try:
        parts = tuple((int(blocks), float(weight)) for blocks, weight in blend)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged; blend must be a list of pairs of blocks and weight") from error
    return Ledger(**values, blend=parts)


def check_ledger_store(ledger: Ledger, store_sha256: str) -> None:
    """Raise UserError unless the store is the one that the run consumed."""
    if ledger.store_sha256 != store_sha256:
        raise UserError(
            f"the run consumed the corpus with sha256 {ledger.store_sha256[:12]}…, but data.folder holds {store_sha256[:12]}…; "
            "point data.folder at the corpus that the run was trained on"
        )


def decile_bounds(ledger: Ledger) -> np.ndarray:
    """Eleven numbers: decile d is the blocks [bounds[d], bounds[d + 1]) of all different ones, numbered as first consumed."""
    return np.array([ledger.distinct_blocks * decile // _DECILES for decile in range(_DECILES + 1)], dtype=np.int64)


def consumed_blocks(ledger: Ledger, store_sha256: str, decile: int | None = None) -> np.ndarray:
    """The different blocks that the run consumed, or one decile of them, in the order of their first consumption: int64 array.

    `store_sha256` is the hash of the store about to be read; UserError when it is another than the run's.
    """
    check_ledger_store(ledger, store_sha256)
    order = ledger.order()
    first, last = _interval(ledger, decile)
    if first == last:
        return np.empty(0, dtype=np.int64)
    blocks = order.blocks(order.first_reading(first), order.first_reading(last - 1) + 1)
    if last - first == len(blocks):
        return blocks
    # Some corpus of a blend begins again before another has been read once. What it repeats has been counted before.
    return np.array([order.block(order.first_reading(number)) for number in range(first, last)], dtype=np.int64)


def draw_consumed_blocks(ledger: Ledger, store_sha256: str, count: int, seed: int, decile: int | None = None) -> np.ndarray:
    """`count` different blocks drawn uniformly from those that the run consumed, or from one decile; all when there are fewer.

    They come in the order of their first consumption. Memory does not grow with the length of the run.
    """
    check_ledger_store(ledger, store_sha256)
    first, last = _interval(ledger, decile)
    generator = np.random.default_rng(seed)
    numbers = first + np.sort(generator.choice(last - first, size=min(count, last - first), replace=False))
    order = ledger.order()
    return np.array([order.block(order.first_reading(int(number))) for number in numbers], dtype=np.int64)


def _interval(ledger: Ledger, decile: int | None) -> tuple[int, int]:
    if decile is None:
        return 0, ledger.distinct_blocks
    if not 0 <= decile < _DECILES:
        raise ValueError(f"decile must lie in [0, {_DECILES}), got {decile}")
    bounds = decile_bounds(ledger)
    return int(bounds[decile]), int(bounds[decile + 1])
