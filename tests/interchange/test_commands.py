"""`import-hf` and `export-hf` as a person meets them, and everything that reads an imported model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.commands import Run
from tests.interchange.folders import change_config, write_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_model(tmp_path / "my-llama")
    return tmp_path / "my-llama"


def test_a_folder_a_setting_and_a_file_name_the_same_import(run: Run, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "import.yaml"
    file.write_text(yaml.safe_dump({"name": "my-llama", "source": str(source), "weight_decay": 0.1}))
    lines = []
    for first in (source, f"source={source}", file):
        code, out, err = run("import-hf", first, f"output={tmp_path / 'runs'}", "weight_decay=0.1")
        assert code == 0, err
        assert "logits as transformers' to" in out
        lines.append(out.splitlines()[-1])
    assert len(set(lines)) == 1
    assert Path(lines[0]).name.startswith("import-my-llama-")


def test_a_dry_run_reads_the_source_and_writes_nothing(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("import-hf", source, f"output={tmp_path / 'runs'}", "--dry-run")
    assert code == 0, err
    assert "parameters: 21,664" in out
    assert not (tmp_path / "runs").exists()


def test_bad_input_is_one_message(run: Run, source: Path, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'runs'}"
    assert "unknown key; did you mean 'weight_decay'" in run("import-hf", source, output, "wieght_decay=1")[2]
    change_config(source, attention_bias=True)
    code, _, err = run("import-hf", source, output)
    assert code == 2
    assert "attention_bias=True" in err
    assert "Traceback" not in err
    code, _, err = run("export-hf", tmp_path / "nothing")
    assert code == 2
    assert "no such checkpoint or run folder" in err


def test_from_an_import_to_an_export_of_its_fine_tuned_child(run: Run, source: Path, tmp_path: Path, repository: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = f"output={tmp_path / 'runs'}"
    base = run("import-hf", source, output)[1].splitlines()[-1]
    settings = ("logging.mlflow=false", "max_length=160", "task={name: arithmetic, train_examples: 16}", "epochs=1")
    code, out, err = run("finetune", repository / "configs/finetune/debug.yaml", f"base={base}", output, *settings)
    assert code == 0, err
    tuned = out.splitlines()[-1]
    evaluation = ("tasks=[{name: arithmetic, test_examples: 3}]", "max_new_tokens=8")
    for model in (base, tuned):
        code, out, err = run("evaluate", repository / "configs/evaluate/debug.yaml", f"run={model}", output, *evaluation)
        assert code == 0, err
    code, out, err = run("analyze", "attention", repository / "configs/analyze/attention.yaml", f"run={base}", output)
    assert code == 2
    assert "pretrained elsewhere" in err
    assert "map_sequences: 0" in err
    for analysis, overrides in {
        "attention": ["map_sequences=0"],
        "probes": ["train_texts=20", "test_texts=10", "seeds=[0]", "max_tokens=32", "datasets=[polarity]"],
    }.items():
        config = repository / f"configs/analyze/{analysis}.yaml"
        code, out, err = run("analyze", analysis, config, f"run={base}", output, *overrides)
        assert code == 0, err
    code, out, err = run("analyze", "overfitting", repository / "configs/analyze/overfitting.yaml", f"run={base}", output)
    assert code == 2
    assert "the gap is that of a pretraining run" in err

    code, out, err = run("export-hf", tuned, "--output", tmp_path / "export", "--dtype", "bfloat16")
    assert code == 0, err
    assert "logits as transformers' to" in out
    prompt = AutoTokenizer.from_pretrained(tmp_path / "export")("2 + 2 =", return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export")(**prompt).logits.shape[-1] == 96
