"""Which variables reach the ranks, and that only harmless ones are on command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.environment import travelling, write_deepspeed_file

BASE = {"HOME": "/nowhere", "PATH": "/usr/bin"}
SECRETS = {
    "MLFLOW_TRACKING_TOKEN": "s3cret-token",  # pragma: allowlist secret
    "MLFLOW_TRACKING_PASSWORD": "s3cret-password",  # pragma: allowlist secret
    "MLFLOW_TRACKING_URI": "https://someone:s3cret-in-uri@mlflow.example",  # pragma: allowlist secret
    "HF_TOKEN": "hf_s3cret",  # pragma: allowlist secret
    "AWS_SECRET_ACCESS_KEY": "s3cret/aws",  # pragma: allowlist secret
    "NCCL_NOT_A_PLACE_FOR": "s3cret-nccl",  # pragma: allowlist secret
    "PYTHON_KEYRING_PASSWORD": "s3cret-keyring",  # pragma: allowlist secret
    "https_proxy": "http://someone:s3cret-proxy@proxy",  # pragma: allowlist secret
}


def test_secrets_take_the_private_way() -> None:
    sent = travelling({**BASE, **SECRETS, "PYTHONPATH": "/a", "LD_LIBRARY_PATH": "/b:/c"})
    assert {name: sent.private[name] for name in SECRETS} == SECRETS
    assert sent.open == {"LD_LIBRARY_PATH": "/b:/c"}
    forwarded_by_deepspeed = {name for name in sent.launcher if name.startswith(("MLFLOW", "PYTHON", "NCCL", "MV2", "UCX"))}
    assert forwarded_by_deepspeed == {"PYTHONPATH"}


def test_settings_of_libraries_go_and_what_belongs_to_a_machine_stays() -> None:
    settings = {"OMP_NUM_THREADS": "4", "GLOO_SOCKET_IFNAME": "ib0", "HF_HOME": "/shared/hf", "NCCL_DEBUG": "INFO"}
    sent = travelling({**BASE, **settings, "CUDA_VISIBLE_DEVICES": "1", "EDITOR": "vi", "MY_OWN": "x"}, ["MY_OWN"])
    assert sent.private == {**settings, "MY_OWN": "x"}


def test_what_deepspeed_exports_of_the_launchers_environment() -> None:
    """DeepSpeed's own lists: nothing else of what the launcher is given may match them."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher.runner import EXPORT_ENVS

    accelerator = get_accelerator()
    assert accelerator is not None
    prefixes = (*EXPORT_ENVS, *accelerator.export_envs(), "NCCL")
    sent = travelling({**BASE, **SECRETS})
    assert not [name for name in sent.launcher if name.startswith(prefixes)]


def test_a_file_of_the_users_own_still_counts(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("MY_SETTING=a b\nDS_ACCELERATOR=cuda\n\n")
    sent = travelling({"HOME": str(tmp_path)})
    assert sent.private == {"MY_SETTING": "a b"}
    assert sent.open == {"DS_ACCELERATOR": "cuda"}
    other = tmp_path / "other"
    other.write_text("MY_SETTING=c\n")
    assert travelling({"HOME": str(tmp_path), "DS_ENV_FILE": str(other)}).private == {"MY_SETTING": "c"}
    other.write_text("no assignment\n")
    with pytest.raises(UserError, match="expected lines NAME=VALUE"):
        travelling({"DS_ENV_FILE": str(other)})


def test_all_that_cannot_travel_is_named() -> None:
    with pytest.raises(UserError) as caught:
        travelling({**BASE, "PYTHONPATH": "/a;rm -rf", "LD_PRELOAD": "$(x)"}, ["ABSENT"])
    for part in ("--env ABSENT: this variable is not set here", "PYTHONPATH: DeepSpeed", "LD_PRELOAD: DeepSpeed"):
        assert part in str(caught.value)


def test_on_this_machine_nothing_travels_openly() -> None:
    sent = travelling({**BASE, "PYTHONPATH": "/a b;c"}, openly=False)
    assert sent.launcher["PYTHONPATH"] == "/a b;c"


def test_deepspeed_reads_the_file_that_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_deepspeed_file(path, {"A": "1", "B": "x=y"})
    assert [line.rstrip("\n").split("=", maxsplit=1) for line in path.read_text().splitlines()] == [["A", "1"], ["B", "x=y"]]
