from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_plasticity.errors import UserError
from megatron_plasticity.evaluation import sandbox, sandbox_child
from megatron_plasticity.evaluation.literals import Value
from megatron_plasticity.evaluation.sandbox import Call, Limits, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

DEFAULT = Limits()
QUICK = Limits(seconds=1.5)


def _give(body: str, arguments: str = "", limits: Limits = DEFAULT) -> Value | None:
    """What f gives whose body this is; its parameters are `a`, `b`."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return Sandbox(limits=limits).run_all([Call(f"def f(a=None, b=None):\n{lines}", arguments)])[0]


@pytest.mark.parametrize(
    ("body", "arguments", "value"),
    [
        ("return a + b", "1, 2", 3),
        ("return a - b", "b=1, a=2", 1),
        ("return None", "", None),
        ("return {1: (a,), 'x': [b, {2}]}", "1.5, b'b'", {1: (1.5,), "x": [b"b", {2}]}),
        ("return set(), (), frozenset('a'), bytearray(b'a')", "", (set(), (), {"a"}, b"a")),
        (
            "from collections import Counter, OrderedDict\nreturn Counter(a), OrderedDict(b=1)",
            "'aab'",
            ({"a": 2, "b": 1}, {"b": 1}),
        ),
        ("return a.keys()", "{1: 2}", {1}),
        ("import re, math, string, itertools, datetime, heapq, copy\nreturn re.sub('a', 'b', a)", "'banana'", "bbnbnb"),
        ("import enum\nclass Number(enum.IntEnum):\n    ONE = 1\nreturn Number.ONE", "", 1),
        ("class Text(str):\n    def __repr__(self): return '1'\nreturn Text('2')", "", "2"),
        ("return list(map(a, [1, 2]))", "lambda x: x + 1", [2, 3]),
        ("return a", "'\\ud800 \\x00 é'", "\ud800 \x00 é"),
        ("print('x' * 10**7)\nreturn 1", "", 1),
        ("return 'x' * 10**5", "", "x" * 10**5),
    ],
)
def test_values_come_back_as_built_in_types(body: str, arguments: str, value: object) -> None:
    assert _give(body, arguments) == Value(value)


@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError",
        "return object()",
        "return iter([1])",
        "return float('nan')",
        "a = []\na.append(a)\nreturn a",
        "return f()",
        "import sys\nsys.setrecursionlimit(10**9)\nreturn f()",
        "return 'x' * 10**7",  # too long a result
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "import os\nos.abort()",
        "bytearray(2 * 1024**3)",
    ],
)
def test_failures_give_no_value(body: str) -> None:
    assert _give(body, limits=QUICK) is None


@pytest.mark.parametrize("body", ["while True: pass", "import time\ntime.sleep(600)", "return 10 ** (10 ** 9)"])
def test_endless_programs_are_killed_at_the_time_limit(body: str) -> None:
    start = time.monotonic()
    assert _give(body, limits=QUICK) is None
    assert time.monotonic() - start < 10


def test_a_memory_bomb_ends_at_the_memory_limit() -> None:
    start = time.monotonic()
    assert _give("while True:\n    a = [a, a, bytearray(10**7)]", limits=Limits(seconds=30)) is None
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "body",
    [
        "import socket\nsocket.socket()\nreturn 1",
        "import socket\nsocket.create_connection(('127.0.0.1', PORT))\nreturn 1",
        "import _socket\n_socket.socket()\nreturn 1",
        "import os\nos.fork()\nreturn 1",
        "import subprocess\nsubprocess.run(['true'])\nreturn 1",
        "import os\nos.system('true')\nreturn 1",
        "import os\nos.execv('/bin/true', ['true'])\nreturn 1",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nreturn 1",
        "import _thread\n_thread.start_new_thread(print, ())\nreturn 1",
        "import os\nos.kill(os.getppid(), 0)\nreturn 1",
        "import os\nos.killpg(os.getpid(), 9)\nreturn 1",
        "import os, signal\nsignal.pthread_kill(os.getpid(), 9)\nreturn 1",
        "open('file', 'w')\nreturn 1",
        "open('/tmp/sandbox-escape', 'w')\nreturn 1",
        "import os\nos.open('file', os.O_CREAT | os.O_RDWR)\nreturn 1",
        "import os\nos.mkdir('folder')\nreturn 1",
        "import os\nos.unlink('request.json')\nreturn 1",
        "open('/etc/passwd').read()\nreturn 1",
        "import io\nio.FileIO('/proc/self/environ').read()\nreturn 1",
        "import os\nos.listdir('/')\nreturn 1",
        "import pathlib\npathlib.Path('request.json').read_text()\nreturn 1",
        "import ctypes\nctypes.CDLL(None)\nreturn 1",
        "import ctypes\nctypes.string_at(0)\nreturn 1",
        "import sys\nsys.modules['os'].fork()\nreturn 1",
        "import mmap\nmmap.mmap(-1, 10)\nreturn 1",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (60, 60))\nreturn 1",
    ],
)
def test_ways_out_are_refused(body: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert _give(body.replace("PORT", str(server.getsockname()[1]))) is None


# What the kernel refuses even where Python's audit hook is not asked: a process confined but for the hook.
_WITHOUT_HOOK = """
import sys, os, socket
sys.path.insert(0, {folder!r})
import sandbox_child
sandbox_child.limit_resources(512 * 1024**2, 5)
sandbox_child.filter_system_calls()
try:
    {statement}
except PermissionError:
    os._exit(7)
except OSError:
    os._exit(8)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("socket.socket()", 7),
        ("os.fork()", 7),
        ("os.execv('/bin/true', ['true'])", 7),
        ("os.kill(os.getppid(), 0)", 7),
        ("os.kill(os.getpid(), 9)", 7),
        ("open('file', 'w')", 7),
        ("open('file', 'a')", 7),
        ("os.open('.', os.O_TMPFILE | os.O_RDWR)", 7),
        ("os.mkdir('folder')", 7),
        ("os.symlink('a', 'b')", 7),
        ("os.unlink('file')", 7),
        ("os.rename('file', 'other')", 7),
        ("os.truncate('file', 0)", 7),
        ("os.chdir('/')", 7),
        ("os.setuid(0)", 7),
        ("os.memfd_create('x')", 7),
        ("os.pipe()", 7),
        ("import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())", 7),
        ("import fcntl; fcntl.fcntl(0, 10, 9)", 7),  # F_SETSIG
        ("import fcntl; fcntl.ioctl(os.open('file', os.O_RDONLY), 0x40086602, bytes(8))", 7),  # FS_IOC_SETFLAGS
        ("import fcntl; fcntl.fcntl(0, fcntl.F_GETFD)", 0),
        ("open('request.json').read()", 0),  # reading is the hook's to refuse
    ],
)
def test_the_kernel_refuses_by_itself(tmp_path: Path, statement: str, code: int) -> None:
    (tmp_path / "request.json").touch()
    (tmp_path / "file").touch()
    source = _WITHOUT_HOOK.format(folder=str(Path(sandbox_child.__file__).parent), statement=statement)
    run = subprocess.run([sys.executable, "-I", "-S", "-c", source], cwd=tmp_path, env={}, timeout=60, check=False)
    assert run.returncode == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "request.json"]


def test_the_verdict_cannot_be_forged_since_the_program_does_not_know_what_is_expected() -> None:
    # Whatever a program writes to the channel, it can only claim a value.
    write = 'import os\nfor d in range(3, 4096):\n    try:\n        os.write(d, b\'{"value": "99"}\')\n    except OSError: pass\n'
    assert _give(write + "os._exit(0)") == Value(99)
    assert _give(write + "return 1") is None  # two messages are none
    assert _give("return type('Any', (), {'__eq__': lambda self, other: True})()") is None
    assert _give("class Any(int):\n    def __eq__(self, other): return True\nreturn Any(3)") == Value(3)


def test_a_fork_bomb_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = tmp_path / "child.py"  # a path of its own, by which its processes are known
    child.write_text(Path(sandbox_child.__file__).read_text())
    monkeypatch.setattr(sandbox, "_CHILD", child)
    assert _give("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", limits=QUICK) is None
    assert [process for process in Path("/proc").glob("[0-9]*") if str(child) in _command(process)] == []


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def test_the_environment_is_empty_and_the_folder_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    assert _give("import os\nreturn 'SECRET' in os.environ") == Value(False)
    assert list(tmp_path.iterdir()) == []


def test_calls_run_side_by_side_and_in_order() -> None:
    calls = [Call("import time\ndef f(a):\n    time.sleep(0.5)\n    return a", str(number)) for number in range(4)]
    start = time.monotonic()
    assert Sandbox(workers=4).run_all(calls) == [Value(number) for number in range(4)]
    assert time.monotonic() - start < 1.9


def test_arguments_see_nothing_of_the_program() -> None:
    assert Sandbox().run_all([Call("secret = 1\ndef f(a): return a", "secret")]) == [None]
    assert _give("return a", "open") is None


def test_a_program_cannot_claim_that_it_is_unconfined() -> None:
    write = (
        'import os\nfor d in range(3, 4096):\n    try:\n        os.write(d, b\'{"unconfined": ""}\')\n    except OSError: pass\n'
    )
    assert _give(write + "os._exit(0)") is None


def test_a_program_dies_with_what_started_it(tmp_path: Path) -> None:
    start = (
        "import sys\nfrom megatron_plasticity.evaluation.sandbox import Call, Limits, Sandbox\n"
        "Sandbox(limits=Limits(seconds=300)).run_all([Call('import time\\ndef f():\\n while True: time.sleep(1)', '')])"
    )
    parent = subprocess.Popen([sys.executable, "-c", start], cwd=Path(sandbox.__file__).parents[2], env={"TMPDIR": str(tmp_path)})
    try:
        child = _lasting_child_of(parent.pid)
    finally:
        parent.kill()
        parent.wait()
    assert _eventually(lambda: str(sandbox_child.__file__) not in _command(child))


def _lasting_child_of(parent: int) -> Path:
    found: list[list[Path]] = []

    def lasts() -> bool:
        found.append(_children_of(parent))
        time.sleep(0.5)
        return len(found[-1]) == 1 and found[-1] == _children_of(parent)

    assert _eventually(lasts)
    return found[-1][0]


def _children_of(parent: int) -> list[Path]:
    return [Path("/proc", pid) for tasks in Path(f"/proc/{parent}/task").glob("*/children") for pid in tasks.read_text().split()]


def _eventually(holds: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_where_the_filter_cannot_be_installed_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    source = Path(sandbox_child.__file__).read_text().replace("    machine = platform.machine()", "    machine = 'pdp11'")
    child.write_text(source)
    monkeypatch.setattr(sandbox, "_CHILD", child)
    with pytest.raises(UserError, match="no filter of system calls for linux on pdp11"):
        _give("return 1")
