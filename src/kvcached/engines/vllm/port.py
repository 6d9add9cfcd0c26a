"""The port of the vLLM server that this process belongs to, for ``kvcached ps`` to show.

The scheduler is a child of the server, and only the server's command line says the port.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

_MOST_ANCESTORS = 4
_DEFAULT = 8000
"""Where ``vllm serve`` listens if nothing is said."""
_ELSEWHERE = ("--config", "--uds", "--headless")
"""Options with which the command line does not tell the port, or there is none."""


def served_port(*, proc: str = "/proc") -> int | None:
    """The port of the nearest vLLM server among this process and its ancestors, if there is one."""
    pid = os.getpid()
    for _ in range(1 + _MOST_ANCESTORS):
        try:
            command = _command(proc, pid)
            pid = _parent(proc, pid)
        except (OSError, ValueError):  # it has ended, or is not ours to see
            return None
        if _is_server(command):
            return _port_in(command)
    return None


def _command(proc: str, pid: int) -> list[str]:
    with open(f"{proc}/{pid}/cmdline", "rb") as file:
        return file.read().decode(errors="replace").rstrip("\0").split("\0")


def _parent(proc: str, pid: int) -> int:
    with open(f"{proc}/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])  # its name may hold anything


def _is_server(command: Sequence[str]) -> bool:
    """Whether this is ``vllm serve``, or vLLM's server started as a module."""
    started = [os.path.basename(word) == "vllm" or word == "vllm.entrypoints.cli.main"
               for word in command[:4]]  # fmt: skip
    if any(started):
        return "serve" in command[started.index(True) + 1 :][:1]
    return any(word == "vllm.entrypoints.openai.api_server"
               or word.endswith("vllm/entrypoints/openai/api_server.py")
               for word in command[:4])  # fmt: skip


def _port_in(command: Sequence[str]) -> int | None:
    """What ``--port`` says, the last one; the default if nothing can say something else."""
    found = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option == "--port":
            found = value if equals else following
    if found is not None:
        return int(found) if found.isdecimal() and int(found) < 1 << 16 else None
    options = {word.partition("=")[0] for word in command}
    return None if options.intersection(_ELSEWHERE) else _DEFAULT
