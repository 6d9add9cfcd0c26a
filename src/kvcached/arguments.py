"""What a ``KVCache`` is made of and called with, checked before anything is done with it.

The broker checks terms too, but answers bad ones as it answers messages that it cannot read.
"""

from __future__ import annotations

import os
from typing import Any

from kvcached.broker.budget import Budget
from kvcached.broker.protocol import MAX_WEIGHT
from kvcached.config import Config, check_name, format_size, parse_size
from kvcached.errors import ClosedError, ForkedProcessError, InvalidInput, KvcachedError
from kvcached.layout import CacheSpec
from kvcached.memory.base import MemoryBackend

DEVICES = "Use 'cpu', 'cuda', 'cuda:1', or a GPU's UUID ('GPU-...', as nvidia-smi -L says it)."
"""The hint for what is none."""


def check_arguments(
    spec: object, device: object, name: Any, max_tokens: object,
    *, budget: object, backend: object, config: object,
) -> None:  # fmt: skip
    """Raise ``InvalidInput`` for what cannot make a cache, whatever the terms."""
    if not isinstance(spec, CacheSpec):
        raise InvalidInput(f"spec is {spec!r}", hint="Make it with CacheSpec(...) or from_hf().")
    if not isinstance(device, str):
        raise InvalidInput(f"device is {device!r}", hint=DEVICES)
    if name is not None:
        check_name(name)
    _check_tokens(max_tokens, spec.block_size)
    _check_part("budget", budget, Budget, "Use LocalBudget(nbytes), or limit='1GiB'.")
    _check_part("backend", backend, MemoryBackend, "Use HostBackend(page_bytes), or device='cpu'.")
    if config is not None and not isinstance(config, Config):
        raise InvalidInput(f"config is {config!r}", hint="Use Config(...) or Config.from_env().")


def _check_tokens(max_tokens: object, block_size: int) -> None:
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise InvalidInput(f"max_tokens is {max_tokens!r}, but must be an integer >= 1")
    most = (1 << 31) - 2 * block_size
    if max_tokens > most:
        raise InvalidInput(f"max_tokens is {max_tokens}, but slots are int32: at most {most}")


def _check_part(name: str, given: object, protocol: type, hint: str) -> None:
    """By name, not by ``isinstance``, which does not see what a wrapper passes on."""
    if given is None:
        return
    wanted = [member for member in vars(protocol) if not member.startswith("_")]
    # a class has the names of its instances
    if isinstance(given, type) or not all(hasattr(given, member) for member in wanted):
        raise InvalidInput(f"{name} is {given!r}, which is no {protocol.__name__}", hint=hint)


def check_terms(limit: Any, floor: Any, weight: Any, *, budget_given: bool) -> None:
    """Raise ``InvalidInput`` for terms that no device could grant.

    Whether the floor lies above the limit is known once percentages have a whole: ``read_terms``.
    """
    least = parse_size(floor, total=1 << 40)  # any whole: it is the form that counts
    if limit is not None:
        parse_size(limit, total=1 << 40)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (number and 0 < weight < MAX_WEIGHT):  # nan is on neither side
        raise InvalidInput(
            f"weight is {weight!r}, but must be a number above 0 and below {MAX_WEIGHT:g}",
            hint="1 is the usual weight; 2 asks for twice the share of the others.",
        )
    if budget_given and (least or weight != 1):
        raise InvalidInput(
            f"floor is {floor!r} and weight {weight!r}, but a budget is given, which has its own",
            hint="Set them where the budget is made, or leave budget= to the cache.",
        )


def read_terms(limit: Any, floor: Any, capacity: int) -> tuple[int | None, int]:
    """Limit and floor in bytes of a device of ``capacity``. ``InvalidInput`` if they disagree."""
    most = None if limit is None else parse_size(limit, total=capacity)
    least = parse_size(floor, total=capacity)
    if most is not None and least > most:
        raise InvalidInput(
            f"the floor of {format_size(least)} is above the limit of {format_size(most)}",
            hint="Lower floor=, or raise limit=.",
        )
    return most, least


def not_open(name: str, pid: int) -> KvcachedError:
    """Why the cache ``name`` of process ``pid`` cannot be used: it is another's, or closed."""
    if os.getpid() != pid:
        return ForkedProcessError(
            f"cache {name!r} belongs to process {pid}, not to this child of it",
            hint="Make the cache after fork(), or start processes with 'spawn'.",
        )
    return ClosedError(f"cache {name!r} is closed")
