"""Configuration: one frozen ``Config``, the only reader of environment variables.

Every variable is listed in ``docs/env.md``; ``tests/test_tidy.py`` compares the two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvcached.errors import InvalidConfig, InvalidInput, InvalidSize

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z%]*)\s*$", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "b": 1} | {
    unit: 1 << shift
    for shift, units in ((10, ("k", "kb", "kib")), (20, ("m", "mb", "mib")),
                         (30, ("g", "gb", "gib")), (40, ("t", "tb", "tib")))
    for unit in units
}  # fmt: skip
HOST_MEMORY = ("anonymous", "memfd")
"""Where the host backend's pages can come from."""
ZERO = ("never", "on-tenant-change", "always")
"""When pages can be cleared."""
SLEEP = ("drop", "keep")
"""What can become of the cached prefixes of an engine that falls asleep."""
_LEAST_PAGE = 4096
_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,63}\Z")


def parse_size(text: int | str, *, total: int | None = None) -> int:
    """Read a size in bytes: ``1048576``, ``"512MiB"``, ``"8G"`` (G means GiB) or ``"40%"``.

    ``total`` is what a percentage refers to. Raises ``InvalidSize``.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise _bad_size(text)
    if isinstance(text, int):
        if text < 0:
            raise _bad_size(text)
        return text
    match = _SIZE.match(text)
    if match is None:
        raise _bad_size(text)
    number, unit = float(match[1]), match[2].lower()
    if number == float("inf"):  # hundreds of digits
        raise _bad_size(text)
    if unit == "%":
        if total is None:
            raise _bad_size(text, "a share, where a size is needed", share="")
        if number > 100:
            raise _bad_size(text, "more than all there is")
        return int(total * number / 100)
    if unit not in _UNITS:
        raise _bad_size(text)
    return int(number * _UNITS[unit])


def _bad_size(
    text: object, what: str = "not a size", *, share: str = ", '40%'"
) -> InvalidSize:  # fmt: skip
    return InvalidSize(f"{text!r} is {what}", hint=f"Sizes: 1048576, '512MiB', '8G' (=GiB){share}.")


def format_size(nbytes: int) -> str:
    """Write a number of bytes for a person: ``format_size(3 << 20) == "3.0 MiB"``."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def check_name(name: str) -> str:
    """Return ``name`` if it can name a tenant or device, else raise ``InvalidInput``.

    Names become file names and table cells, so the alphabet is small.
    """
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidInput(
            f"{name!r} is not a valid name",
            hint="Names: a-z, 0-9, '.', '_' and '-', at most 64, starting with a letter or digit.",
        )
    return name


def _flag(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in {"1", "true", "yes", "on"}:
        return True
    if lowered in {"", "0", "false", "no", "off"}:
        return False
    raise InvalidConfig(f"{text!r} is not a flag", hint="Use 1 or 0.")


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of a process. Field ``x`` is read from ``KVCACHED_X``."""

    runtime_dir: str = ""
    """Directory of the broker's sockets; empty: see ``broker.protocol.runtime_dir``."""
    budget: str = ""
    """Capacity of a device for all tenants together (``"8G"``, ``"40%"``); empty: the default."""
    headroom: str = "1GiB"
    """What the default capacity leaves to memory outside kvcached."""
    broker: bool = True
    """Share one budget with the other processes of the device. Off: a budget of one's own."""
    check: bool = False
    """Verify the invariants after each operation that changes what is backed (slow; for tests)."""
    host_page: str = ""
    """Page size of the host backend; empty: the largest power of two that divides a block."""
    host_memory: str = "anonymous"
    """Where the host backend's pages come from: ``anonymous`` or ``memfd``."""
    max_handle: str = "256MiB"
    """Largest single physical allocation."""
    spare_seconds: float = 1.0
    """How long freed extents may stay mapped as spares when nothing grows."""
    ahead: str = "1GiB"
    """Most memory to back ahead of demand, and at most a sixteenth of the limit; ``0``: none."""
    zero: str = "on-tenant-change"
    """When device pages are cleared: ``never``, ``on-tenant-change`` or ``always``."""
    name: str = ""
    """How other processes see an engine that is plugged into; empty: its model and process."""
    limit: str = ""
    """Most memory of such an engine (``"20GiB"``, ``"40%"`` of the budget); empty: its own rule."""
    floor: str = "0"
    """Memory of such an engine that is never reclaimed for others."""
    weight: float = 1.0
    """Share of such an engine in what lies above all floors."""
    max_tokens: int = 0
    """Address space of such an engine, in tokens; 0: what it could ever use."""
    sleep: str = "drop"
    """Cached prefixes of such an engine when it falls asleep: ``drop`` or ``keep``."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            _check(item.name, value, f"{item.name}={value!r}")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read ``KVCACHED_*`` from ``environ`` (default: ``os.environ``).

        An empty variable counts as one that is not set. Raises ``InvalidConfig`` naming the
        variable. Unknown variables are left alone (``kvcached doctor`` lists them).
        """
        env = os.environ if environ is None else environ
        given = {f.name: text for f in fields(cls)
                 if (text := env.get(f"KVCACHED_{f.name.upper()}", ""))}  # fmt: skip
        values: dict[str, Any] = {name: _read(name, text) for name, text in given.items()}
        if not values.get("runtime_dir") and env.get("XDG_RUNTIME_DIR"):
            values["runtime_dir"] = f"{env['XDG_RUNTIME_DIR']}/kvcached"
        return cls(**values)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value  # no path holds a zero byte


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and (not value or bool(_NAME.match(value)))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_seconds(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < 1e6


def _is_page(value: Any) -> bool:
    if not isinstance(value, str) or not value:
        return value == ""  # the choice is left to us
    nbytes = parse_size(value)
    return nbytes >= _LEAST_PAGE and not nbytes & (nbytes - 1)


def _is_size(*, empty: bool = False, share: bool = False) -> Callable[[Any], bool]:
    """A test for sizes as text; ``empty`` leaves the choice to us, ``share`` allows ``"40%"``."""

    def test(value: Any) -> bool:
        if not isinstance(value, str):
            return False
        if value or not empty:
            parse_size(value, total=1 if share else None)
        return True

    return test


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "runtime_dir": (_is_text, "Use the path of a directory."),
    "budget": (_is_size(empty=True, share=True), "Use '8G' or '40%'."),
    "headroom": (_is_size(share=True), "Use '1GiB' or '5%'."),
    "broker": (_is_flag, "Use True or False; of a variable, 1 or 0."),
    "check": (_is_flag, "Use True or False; of a variable, 1 or 0."),
    "host_page": (_is_page, "Use a power of two from 4KiB on, such as '64KiB'."),
    "host_memory": (HOST_MEMORY.__contains__, f"Use {' or '.join(HOST_MEMORY)}."),
    "max_handle": (_is_size(), "Use '256MiB'."),
    "spare_seconds": (_is_seconds, "Use a number of seconds >= 0."),
    "ahead": (_is_size(share=True), "Use '1GiB', or '0' for none."),
    "zero": (ZERO.__contains__, f"Use {', '.join(ZERO)}."),
    "name": (_is_name, "Use a-z, 0-9, '.', '_' and '-', at most 64, a letter or digit first."),
    "limit": (_is_size(empty=True, share=True), "Use '20GiB' or '40%'."),
    "floor": (_is_size(share=True), "Use '2GiB' or '5%'."),
    "weight": (lambda value: _is_seconds(value) and value > 0, "Use a number above 0."),
    "max_tokens": (_is_count, "Use a number of tokens, or 0."),
    "sleep": (SLEEP.__contains__, f"Use {' or '.join(SLEEP)}."),
}
"""What each field may be, and the hint for what it may not."""
_READERS: dict[str, Callable[[str], Any]] = {
    "broker": _flag,
    "check": _flag,
    "spare_seconds": float,
    "weight": float,
    "max_tokens": int,
}
"""From the text of a variable to the value of a field, where that is not the text itself."""


def _check(name: str, value: Any, said: str) -> None:
    """Raise ``InvalidConfig`` unless field ``name`` may be ``value``; ``said``: how it was set."""
    fits, hint = _FIELDS[name]
    try:
        good = fits(value)
    except InvalidSize as error:
        raise InvalidConfig(f"{said}: {error.message}", hint=error.hint) from error
    if not good:
        raise InvalidConfig(f"{said} cannot work", hint=hint)


def _read(name: str, text: str) -> Any:
    said = f"KVCACHED_{name.upper()}={text!r}"
    try:
        value = _READERS.get(name, str)(text)
    except ValueError as error:  # InvalidConfig is one too
        raise InvalidConfig(f"{said} cannot work", hint=_FIELDS[name][1]) from error
    _check(name, value, said)
    return value


def plugin_mode(environ: Mapping[str, str] | None = None) -> str:
    """Whether engines become elastic by themselves: ``"off"``, ``"on"`` or ``"strict"``.

    ``KVCACHED``; with ``strict`` an engine that cannot be made elastic is an error and not left
    alone. ``ENABLE_KVCACHED``, the name of the C++ project's switch, means the same.
    """
    env = os.environ if environ is None else environ
    variable = "KVCACHED" if "KVCACHED" in env else "ENABLE_KVCACHED"
    text = env.get(variable, "")
    if text.strip().lower() == "strict":
        return "strict"
    try:
        return "on" if _flag(text) else "off"
    except InvalidConfig as error:
        said = f"{variable}={text!r} cannot work"
        raise InvalidConfig(said, hint="Use 1, 0 or strict.") from error


THEIRS = {
    "ENABLE_KVCACHED": "KVCACHED",
    "KVCACHED_IPC_NAME": "KVCACHED_NAME",
    "KVCACHED_GPU_UTILIZATION": "KVCACHED_LIMIT",
}
"""Variables of the C++ project of the same name, and those of ours that they stand for."""
VARIABLES = frozenset({
    *(f"KVCACHED_{field.name.upper()}" for field in fields(Config)),
    "KVCACHED", *THEIRS,  # plugin_mode, engine_config
    "KVCACHED_HYPOTHESIS_PROFILE", "KVCACHED_CI_VENV", "KVCACHED_VLLM_WHEELS",  # its development
})  # fmt: skip
"""The variables that somebody reads."""


def read_for_theirs(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of the C++ project that are set, and those of ours that they stand for."""
    env = os.environ if environ is None else environ
    return {theirs: ours for theirs, ours in THEIRS.items() if env.get(theirs)}


_ENGINE_HANDLE = "32MiB"
"""About what a request of a few hundred tokens takes. A larger one still holds blocks of other
requests when most of its own have ended, and nothing of it can be given back."""


def engine_config(environ: Mapping[str, str] | None = None) -> Config:
    """``Config.from_env``, and what the C++ project of the same name calls otherwise.

    ``KVCACHED_GPU_UTILIZATION`` (a fraction) stands for ``KVCACHED_LIMIT``, and
    ``KVCACHED_IPC_NAME`` for ``KVCACHED_NAME``, unless ours are set. Memory comes in smaller pieces
    than elsewhere: those of a request are empty when it ends, and can go to others.
    """
    given = os.environ if environ is None else environ
    env = {variable: text for variable, text in given.items() if text}
    name = re.sub(r"[^a-z0-9._-]", "-", env.get("KVCACHED_IPC_NAME", "").lower()).strip("-._")
    if name:
        env.setdefault("KVCACHED_NAME", name[:64])
    share = env.get("KVCACHED_GPU_UTILIZATION", "")
    if re.fullmatch(r"0?\.[0-9]+|1(\.0*)?", share):
        env.setdefault("KVCACHED_LIMIT", f"{float(share) * 100:g}%")
    env.setdefault("KVCACHED_MAX_HANDLE", _ENGINE_HANDLE)
    return Config.from_env(env)
