"""The benches as commands: what their help says, and how they answer bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.tools import TOOLS

BAD_INPUT = {
    "attention": ["--threads 0", "--dense-heads -1", "--dense-heads 1000", "--model nope.yaml"],
    "capture": ["--turns 0", "--megabytes 15"],
    "data": ["--megabytes 0", "--megabytes nan", "--tokens 2500", "--tokens 2000", "--text nope", "--tokenizer nope.json"],
    "generate": ["--samples 0", "--layers 0", "--query-heads 7", "--kv-heads 3", "--hidden-size 392", "--slots 8"],
    "side_by_side": ["--hidden-sizes 48", "--turns 0"],
    "step_time": ["--steps 0", "--patience nan", "--cases nope", "--output nowhere/rows.json"],
    "train_cpu": ["--hidden-size 100", "--steps 0", "--turns 0", "--batch 3", "--litgpt-python /nowhere/python"],
}
PARTS = ("side_by_side_training", "train_gpu_candidates", "training_peers", "training_setting")
WITH_TORCH = "step_time"
"""What it measures is spelt in torch at its head, so that even its help imports it."""


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=TOOLS.parent)


# One process calls a bench as often as there is something to say to it: starting one costs more than its answer.
CALLS = """
import runpy, sys
sys.path.insert(0, "tools/bench")
for line in {lines!r}:
    sys.argv = ["bench", *line.split()]
    try:
        runpy.run_path("tools/bench/{name}.py", run_name="__main__")
        print("ended without a code")
    except SystemExit as end:
        print("ended with", end.code)
    sys.stderr.write("---\\n")
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("name", BAD_INPUT)
def test_help_has_an_example_and_bad_input_is_one_line(name: str) -> None:
    ended = _run(CALLS.format(name=name, lines=["--help", *BAD_INPUT[name]]))
    help_text, *codes, torch_imported = (
        ended.stdout.rsplit("ended with", len(BAD_INPUT[name]) + 1)[0],
        *[line for line in ended.stdout.splitlines() if line.startswith("ended")],
        ended.stdout.splitlines()[-1],
    )
    assert f"python tools/bench/{name}.py" in help_text
    assert "exit codes: 0 all is as wanted; 1 " in help_text
    assert codes == ["ended with 0"] + ["ended with 2"] * len(BAD_INPUT[name])
    assert torch_imported == str(name == WITH_TORCH)
    silence, *complaints, _ = ended.stderr.split("---\n")
    assert silence == ""
    for line, complaint in zip(BAD_INPUT[name], complaints, strict=True):
        assert complaint.startswith("error: "), ended.stderr
        assert complaint.count("\n") == 1, ended.stderr
        assert line.split()[-1] in complaint, ended.stderr


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_bench_says_that_it_is_no_command(name: str) -> None:
    ended = subprocess.run([sys.executable, str(TOOLS / f"bench/{name}.py")], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: this is a part of tools/bench/")
    assert ended.stderr.count("\n") == 1
