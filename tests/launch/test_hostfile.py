"""Hostfiles, and which of their machines are used: as DeepSpeed reads them, which is asked itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_plasticity.errors import UserError
from megatron_plasticity.launch.hostfile import Host, chosen, read_hostfile

HOSTFILE = "# the big ones\nnode1 slots=4\n\n  node2   slots=8  # new\nnode3 slots=1\n"


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text(HOSTFILE)
    return path


def test_it_is_read_in_its_order(hostfile: Path) -> None:
    assert [(host.name, len(host.slots)) for host in read_hostfile(hostfile)] == [("node1", 4), ("node2", 8), ("node3", 1)]


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        (None, None),
        ("node2", None),
        ("node3@node1", None),
        ("node2:1,0@node1:3", None),
        (None, "node2"),
        (None, "node1:0,2@node3"),
    ],
)
def test_the_same_machines_as_deepspeed_takes(hostfile: Path, include: str | None, exclude: str | None) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

    theirs = parse_inclusion_exclusion(fetch_hostfile(str(hostfile)), include or "", exclude or "")
    ours = chosen(read_hostfile(hostfile), include, exclude)
    assert [(host.name, list(host.slots)) for host in ours] == list(theirs.items())


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("node1\nnode2 slots=8\nnode2 slots=4\nnode3 slots=0\n")
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    said = str(caught.value)
    for part in ("line 1: 'node1'", "line 3: node2 is there already", "line 4: 'node3 slots=0'"):
        assert part in said
    path.write_text("ada@node1 slots=8\nnode2 slots=8 max_slots=8\n")
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert "user names belong into ~/.ssh/config (`Host node1`, `User ada`); write: node1 slots=8" in str(caught.value)
    assert "max_slots is for MPI alone; write: node2 slots=8" in str(caught.value)
    path.write_text("# nobody\n")
    with pytest.raises(UserError, match="names no machine"):
        read_hostfile(path)
    with pytest.raises(UserError, match=r"nowhere: cannot read this hostfile: No such file"):
        read_hostfile(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("include", "exclude", "part"),
    [
        ("node9@node1:7", None, "'node9' is not in the hostfile, which has node1"),
        ("node9@node1:7", None, "node1 has no slot 7, only 0 to 3"),
        ("node1:x", None, "node1 has no slot x"),
        (None, "node1", "leaves no machine"),
        ("node1", "node1", "state one of the two"),
    ],
)
def test_a_choice_that_cannot_be(include: str | None, exclude: str | None, part: str) -> None:
    with pytest.raises(UserError, match=part):
        chosen([Host("node1", (0, 1, 2, 3))], include, exclude)
