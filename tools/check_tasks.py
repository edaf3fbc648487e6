"""Prepare every task that a folder has the data for, and compare the numbers of rows with those that are known.

    python tools/check_tasks.py --from path/to/data

The folder is laid out as docs/tasks.md says. Tasks whose data are not there are named and passed over. Prints a table with the
overlap between training and test rows. Exit code: 0 if all numbers are right, 1 if not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation.tasks.catalogue import load_task_file, shipped_tasks
from megatron_plasticity.evaluation.tasks.prepare import find_origins, prepare_task

# Training examples of each part, questions of each test set.
KNOWN: dict[str, dict[str, int]] = {
    "gsm8k": {"train": 7473, "gsm8k_platinum": 1209},
    "math": {"train": 4500, "math_500": 500},
    "cruxeval": {"output": 600, "input": 600, "cruxeval_output": 200, "cruxeval_input": 200},
    "boardgameqa": {"train": 2904, "boardgameqa_500": 500},
    "tabmwp": {"train": 1000, "tabmwp_test1k": 1000},
    "strategyqa": {"train": 2061, "strategyqa_dev": 229},
    "pubmedqa-labelled": {"train": 500, "pubmedqa_test": 500},
    "metamathqa": {"train": 395_000, "gsm8k_platinum": 1209, "math_test": 5000},
    "simplescaling": {"train": 54_484, "gsm8k_platinum": 1209, "math_test": 5000},
    "medmcqa-cot": {"train": 182_736, "medmcqa_validation": 4183},
    "pubmedqa": {"train": 211_269, "pubmedqa_labelled": 1000},
    "mmlu-pro-cot": {"train": 130_811, "mmlu_pro_cot_validation": 840},
    "race": {"train": 92_737, "race_test": 4934},
}
MMLU_PRO_RIGHT = 7559
MATH_LEVELS = {"level 1": 437, "level 2": 894, "level 3": 1131, "level 4": 1214, "level 5": 1324}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR", help="folder with the data")
    source: Path = parser.parse_args(arguments).source
    wrong: list[str] = []
    print(
        "| task | training rows | test set | rows | distinct | exact overlap | n-gram overlap | responses without their answer |"
    )
    print("|---|---|---|---|---|---|---|---|")
    absent: list[str] = []
    with tempfile.TemporaryDirectory(prefix="check-tasks-") as temporary:
        for name, path in shipped_tasks().items():
            task = load_task_file(path)
            try:
                find_origins(task, source, str(path))
            except UserError as error:
                absent.append(f"{name}: {error}")
                continue
            _, manifest = prepare_task(task, source, Path(temporary), str(path))
            for line in rows_of_table(manifest):
                print(line, flush=True)
            wrong += problems(manifest)
    for line in absent:
        print(f"not there: {line}")
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


def rows_of_table(manifest: dict[str, Any]) -> Iterator[str]:
    """A row of the table for each test set."""
    train = manifest["train"]
    bad = sum(part["own_answers"]["unreadable"] + part["own_answers"]["wrong"] for part in train["parts"].values())
    for name, part in manifest["test_sets"].items():
        overlap = manifest["overlap"][name]
        cells = [manifest["name"], f"{train['examples']:,}", name, f"{part['examples']:,}", f"{part['distinct_questions']:,}"]
        for kind in ("exact", "ngram"):
            found = overlap[kind]
            removed = ", removed" if found["removed"] and found["train_rows"] else ""
            cells.append(f"{found['test_questions']:,} of {part['examples']:,} ({found['train_rows']:,} training rows{removed})")
        yield f"| {' | '.join([*cells, f'{bad:,}'])} |"


def problems(manifest: dict[str, Any]) -> Iterator[str]:
    """Numbers that are not as known."""
    name, parts, tests = manifest["name"], manifest["train"]["parts"], manifest["test_sets"]
    counts = {part: described["examples"] for part, described in (parts | tests).items()}
    for part, wanted in KNOWN.get(name, {}).items():
        if counts.get(part) != wanted:
            yield f"{name}: {part} has {counts.get(part)} examples, expected {wanted:,}"
    if "math_test" in tests and tests["math_test"]["groups"] != MATH_LEVELS:
        yield f"{name}: math_test has the levels {tests['math_test']['groups']}, expected {MATH_LEVELS}"
    if name == "mmlu-pro":
        yield from _mmlu_pro_problems(parts["train"], tests["mmlu_pro_right"])


def _mmlu_pro_problems(train: dict[str, Any], test: dict[str, Any]) -> Iterator[str]:
    # The rows that are right are those that end with their answer and those that do not.
    right = {}
    for side, part in (("train", train), ("test", test)):
        right[side] = part["rows_read"] - part["on_the_other_side"] - part.get("left_out", {}).get("Llama 3.1 70B was right", 0)
    total = right["train"] + right["test"]
    if total != MMLU_PRO_RIGHT:
        yield f"mmlu-pro: {total} chains of thought are right, expected {MMLU_PRO_RIGHT:,}"
    if not 0.09 < right["test"] / total < 0.11:
        yield f"mmlu-pro: {right['test'] / total:.1%} of the rows that are right are for testing, expected about a tenth"


if __name__ == "__main__":
    sys.exit(main())
