"""Hand-made rows in every layout that the shipped task files read. None is from the data sets."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Row = dict[str, Any]

GSM8K = [
    {"question": "Two and 3?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 5"},
    {"question": "Ten less 1?", "answer": "9\n#### 9"},
]
MATH = [
    {"problem": "Half of $8$?", "level": "Level 1", "type": "Algebra", "solution": "$8/2=\\boxed{4}$."},
    {"problem": "$\\dfrac{1}{2}$ of $8$ less $\\frac{1}{2}$?", "level": "Level 2", "type": "Algebra", "solution": "\\boxed{3.5}"},
]
MATH_500 = [
    {
        "problem": "$\\frac{1}{2}$ of $8$ less $\\frac{1}{2}$?",
        "solution": "$\\boxed{3.5}$",
        "answer": "3.5",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "a/1",
    }
]
CRUXEVAL = [
    {"code": f"def f(a):\n    return {{'x': a + {n}}}", "input": "1", "output": f"{{'x': {n + 1}}}", "id": f"sample_{n}"}
    for n in range(203)
]
MMLU_PRO = [
    {
        "question_id": n,
        "question": f"Which number is {n}?",
        "options": [str(n), str(n + 1), str(n + 2)],
        "answer": "A",
        "pred": "B" if n == 7 else "A",
        "category": "counting",
        "generated_text": " I cannot tell" if n == 8 else " It is the first. The answer is (A).\n\n",
    }
    for n in range(40)
]
RACE = [
    {
        "example_id": "high1.txt",
        "article": "Ann has a dog.",
        "question": "Who has it?",
        "options": ["Bo", "Ann", "Cy.", "Di"],
        "answer": answer,
    }
    for answer in ("B", "C")
]


def pubmedqa(numbers: Iterable[int]) -> list[Row]:
    return [
        {
            "pubid": n,
            "question": f"Does drug {n} help?",
            "context": {"contexts": ["It was tried.", f"{n} got well."], "labels": ["A", "B"], "meshes": ["M"]},
            "long_answer": "It helps.",
            "final_decision": "yes",
        }
        for n in numbers
    ]


HUB: dict[str, dict[str, list[Row]]] = {
    # "<owner>/<name>": {"<config>/<split>": rows}
    "openai/gsm8k": {"main/train": GSM8K[:1]},
    "madrylab/gsm8k-platinum": {"main/test": [row | {"cleaning_status": "consensus"} for row in GSM8K[1:]]},
    "EleutherAI/hendrycks_math": {
        f"{config}/{split}": [row | {"problem": f"{row['problem']} ({config}, {split})"} for row in MATH]
        for config in (
            [
                "algebra",
                "counting_and_probability",
                "geometry",
                "intermediate_algebra",
                "number_theory",
                "prealgebra",
                "precalculus",
            ]
        )
        for split in ("train", "test")
    },
    "HuggingFaceH4/MATH-500": {"default/test": MATH_500},
    "cruxeval-org/cruxeval": {"default/test": CRUXEVAL},
    "meta-math/MetaMathQA": {
        "default/train": [
            {
                "type": "GSM_Rephrased",
                "query": "What is 2+3?",
                "original_question": "2+3?",
                "response": "5.\n#### 5\nThe answer is: 5",
            },
            {"type": "MATH_Rephrased", "query": "A half?", "original_question": "?", "response": "The answer is: \\frac{1}{2}"},
        ]
    },
    "simplescaling/data_ablation_full59K": {
        "default/train": [
            {"question": "A third of 9?", "attempt": "So \\boxed{3}", "solution": "3", "thinking_trajectories": ["long"]},
            {"question": "And of 10?", "attempt": "I gave up.", "solution": "10/3", "thinking_trajectories": ["long"]},
        ]
    },
    "HPAI-BSC/medmcqa-cot-llama31": {
        "default/train": [
            {"system_prompt": "s", "question": "Which?\nOptions:\nA. a\nB. b\nC. c\nD. d", "response": "It is b.\n\nAnswer: B."},
            {"system_prompt": "s", "question": "Who?\nOptions:\nA. a\nB. b\nC. c\nD. d", "response": "So c.\n\n**Answer: C**"},
        ]
    },
    "openlifescienceai/medmcqa": {
        "default/validation": [{"id": "x", "question": "Where?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 3}]
    },
    "qiaojin/PubMedQA": {"pqa_artificial/train": pubmedqa(range(3)), "pqa_labeled/train": pubmedqa(range(3, 5))},
    "dongboklee/MMLU-Pro-Llama-3.1-70B-Instruct-CoT": {
        "default/test": [{"question": "First?", "options": ["x", "y"], "answer": "A", "cot": "The answer is (A)."}],
        "default/validation": [{"question": "Last?", "options": ["x", "y"], "answer": "B", "cot": "The answer is (B)."}] * 3,
    },
    "ehovy/race": {"all/train": RACE[:1], "all/validation": RACE[1:], "all/test": RACE[1:]},
}

FILES: dict[str, Any] = {
    "gsm8k/train.jsonl": GSM8K[:1],
    "gsm8k/platinum_test.evolm.jsonl": [
        {"id": "p", "problem": GSM8K[1]["question"], "gt_solution": GSM8K[1]["answer"], "gt_answer": None}
    ],
    "math/test5000.jsonl": [row | {"idx": number} for number, row in enumerate(MATH)],
    "math/math500_test.jsonl": [
        {"query": row["problem"], "response": row["solution"], "answer": row["answer"], "subject": "Algebra", "level": 2}
        for row in MATH_500
    ],
    "cruxeval/cruxeval.jsonl": CRUXEVAL,
    "boardgameqa/boardmaindp1_test.json": [
        {"id": "1", "question": "Does the cat win?", "proof": 'By Rule1 it is proved and the answer is "yes".', "label": "proved"}
    ],
    "boardgameqa/boardmaindp2_test.json": [
        {"id": "1", "question": "Does the dog win?", "proof": 'It is disproved and the answer is "no".', "label": "disproved"}
    ],
    "boardgameqa/boardmaindp3_test.json": [
        {"id": "1", "question": "Does the owl win?", "proof": "It is open.", "label": "unknown"}
    ],
    "boardgameqa/BoardgameQA500.evolm.jsonl": [
        {"id": "b", "problem": "Say True, False or Uncertain.\n\nDoes the dog win?", "gt_solution": "False", "gt_answer": "False"}
    ],
    "tabmwp/problems_dev1k.json": {
        "7": {
            "question": "Which costs more?",
            "choices": ["hat", "cap"],
            "answer": "cap",
            "unit": None,
            "table_title": "Prices",
            "table": "hat | $1\ncap | $2",
            "solution": "A cap costs more.",
            "ans_type": "extractive_text",
        }
    },
    "tabmwp/problems_test1k.json": {
        "9": {
            "question": "How much are both?",
            "choices": None,
            "answer": "3.10",
            "unit": "$",
            "table_title": None,
            "table": "hat | $1\ncap | $2.10",
            "solution": "Add them.",
            "ans_type": "decimal_number",
        }
    },
    "strategyqa/train.json": [
        {"qid": "a", "question": "Is ice cold?", "answer": True, "facts": ["Ice is frozen."]},
        {"qid": "b", "question": "Is fire cold?", "answer": False, "facts": ["Fire burns.", "It is hot."]},
    ],
    "strategyqa/flan_cot_strategyqa_train.tsv": 'Is ice cold?\tyes\tIce is frozen "water".\n',
    "strategyqa/dev.json": [{"qid": "c", "question": "Is snow hot?", "answer": False, "facts": ["Snow is frozen."]}],
    "pubmedqa/ori_pqal.json": {
        str(n): {
            "QUESTION": f"Does drug {n} help?",
            "CONTEXTS": ["It was tried.", "Some got well."],
            "LONG_ANSWER": "It may.",
            "final_decision": "maybe",
        }
        for n in (1, 2, 3)
    },
    "pubmedqa/test_ground_truth.json": {"2": "maybe"},
    "mmlu_pro/model_outputs_Meta-Llama-3_1-70B-Instruct_5shots.zip": MMLU_PRO,
}


def write_json_lines(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_files(folder: Path) -> None:
    """Every file that a shipped task reads below a folder."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        match path.suffix:
            case ".jsonl":
                write_json_lines(path, content)
            case ".json":
                path.write_text(json.dumps(content), encoding="utf-8")
            case ".tsv":
                path.write_text(content, encoding="utf-8")
            case ".zip":
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("outputs.json", json.dumps(content))


def write_hub(folder: Path, names: Iterable[str] = HUB) -> None:
    """Folders laid out like the repositories of the hub: a card that names the configurations, and their Parquet files."""
    for name in names:
        repository = folder / name
        configs: dict[str, list[str]] = {}
        for place, rows in HUB[name].items():
            config, split = place.split("/")
            configs.setdefault(config, []).append(split)
            path = repository / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        lines = ["---", "configs:"]
        for config, splits in configs.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            lines += [line for split in splits for line in (f"  - split: {split}", f"    path: {config}/{split}-*")]
        (repository / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
