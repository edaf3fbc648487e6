"""Two nodes on one machine: network namespaces joined by a cable, each with its own processes, host name and sshd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("node1", "node2")
_SSHD = "/usr/sbin/sshd"


def missing() -> str | None:
    """Why there can be no nodes here; None if there can."""
    if os.geteuid() != 0:
        return "two nodes need network namespaces, which only root may make"
    programs = {"ip": "iproute2", "pdsh": "pdsh", "ssh": "openssh-client", _SSHD: "openssh-server", "unshare": "util-linux"}
    if absent := [package for program, package in programs.items() if shutil.which(program) is None]:
        return f"two nodes need Debian's {', '.join(absent)}"
    trial = f"mp-trial-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", trial], capture_output=True)
    return f"this machine makes no network namespace: {made.stderr.strip()}" if made.returncode else None


@dataclass
class Nodes:
    """The nodes, and how to start a program on the first of them, as one does on a cluster's head node."""

    folder: Path
    _sshd: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    @property
    def ssh_arguments(self) -> str:
        return f"-F {self.folder / 'ssh_config'}"

    def namespace(self, name: str) -> str:
        return f"mp-{os.getpid()}-{name}"

    def address(self, name: str) -> str:
        return f"10.213.7.{NAMES.index(name) + 1}"

    def on_first(self, command: list[str]) -> list[str]:
        """A command that runs in the first node's network."""
        return ["ip", "netns", "exec", self.namespace(NAMES[0]), *command]

    def start(self, name: str) -> None:
        """Switch the node on."""
        sshd = f"hostname {name} && exec {_SSHD} -D -e -f {self.folder / 'sshd_config'}"
        # Process 1 of a process namespace of its own: when it is killed, so is everything on the node.
        isolated = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", sshd]
        with (self.folder / f"sshd-{name}.log").open("ab") as log:
            self._sshd[name] = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(name), *isolated], stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 20
        while subprocess.run(self.on_first(["ssh", *self.ssh_arguments.split(), name, "true"]), capture_output=True).returncode:
            assert time.monotonic() < deadline, (self.folder / f"sshd-{name}.log").read_text()
            time.sleep(0.2)

    def kill(self, name: str) -> None:
        """Every process of the node is gone at once."""
        self._sshd[name].send_signal(signal.SIGKILL)
        self._sshd[name].wait()

    def cut(self) -> None:
        """Pull the cable. Nothing says so to either side."""
        self._ip("-n", self.namespace(NAMES[1]), "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Put the cable back."""
        self._ip("-n", self.namespace(NAMES[1]), "link", "set", "eth0", "up")

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def two_nodes(folder: Path, slots: int = 1) -> Iterator[Nodes]:
    """Both nodes switched on; `folder` takes their keys and configs."""
    nodes = Nodes(folder)
    _write_configs(nodes, slots)
    first, second = (nodes.namespace(name) for name in NAMES)
    try:
        for name in (first, second):
            nodes._ip("netns", "add", name)
        nodes._ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for name in NAMES:
            inside = ("-n", nodes.namespace(name))
            nodes._ip(*inside, "address", "add", f"{nodes.address(name)}/24", "dev", "eth0")
            nodes._ip(*inside, "link", "set", "lo", "up")
            nodes._ip(*inside, "link", "set", "eth0", "up")
        for name in NAMES:
            nodes.start(name)
        yield nodes
    finally:
        for name in list(nodes._sshd):
            nodes.kill(name)
        for name in (first, second):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _write_configs(nodes: Nodes, slots: int) -> None:
    folder = nodes.folder
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
    (folder / "sshd_config").write_text(
        f"HostKey {folder / 'host_key'}\nAuthorizedKeysFile {folder / 'user_key.pub'}\nPidFile none\nStrictModes no\n"
        "UsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "MaxStartups 100\n"
    )
    hosts = "".join(f"Host {name}\n  HostName {nodes.address(name)}\n" for name in NAMES)
    (folder / "ssh_config").write_text(
        f"{hosts}Host *\n  User root\n  IdentityFile {folder / 'user_key'}\n  IdentitiesOnly yes\n"
        f"  StrictHostKeyChecking accept-new\n  UserKnownHostsFile {folder / 'known_hosts'}\n  LogLevel ERROR\n"
    )
    nodes.hostfile.write_text("".join(f"{name} slots={slots}\n" for name in NAMES))
