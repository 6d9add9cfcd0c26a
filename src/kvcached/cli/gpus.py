"""What ``kvcached doctor`` says of the NVIDIA driver and of each GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from kvcached.broker.nvml import NvmlCard, open_card
from kvcached.broker.probe import CardError
from kvcached.cli import costs, probes
from kvcached.cli.checks import Check
from kvcached.config import format_size
from kvcached.errors import KvcachedError
from kvcached.memory.cuda import load_driver
from kvcached.memory.driver import Driver

_MOST_SHOWN = 4
_ROOM_TO_MEASURE = 1 << 30
"""A context takes half a GiB: not from those who need it."""
_PROHIBITED = 2
_MODES = {1: "exclusive thread", _PROHIBITED: "prohibited", 3: "exclusive process"}


def gpu_checks(
    facts: probes.DriverFacts, *, bindings: str | None,
    find: Callable[[str], NvmlCard] = open_card, load: Callable[[], Driver] = load_driver,
) -> Iterator[Check]:  # fmt: skip
    """The driver, then the GPUs. ``bindings``: the version of ``cuda-bindings``, if installed.

    The costs are measured on the first GPU that can be used: the others are of the same machine.
    """
    if facts.problem:
        yield Check("nvidia driver", "info", f"{facts.problem}; device='cpu' only")
        return
    with contextlib.ExitStack() as stack:
        cards = {gpu.index: _open(gpu, find, stack) for gpu in facts.gpus}
        yield _check_versions(facts, bindings, [card for card in cards.values() if card])
        can_measure = bindings is not None
        for gpu in facts.gpus:
            yield from _check_gpu(gpu)
            free = None
            card = cards[gpu.index]
            if card is not None:
                free, checks = _check_card(gpu, card)
                yield from checks
            if can_measure and gpu.virtual_memory and gpu.compute_mode != _PROHIBITED:
                can_measure = False
                yield from _check_costs(gpu, free, load)


def _open(
    gpu: probes.Gpu, find: Callable[[str], NvmlCard], stack: contextlib.ExitStack
) -> NvmlCard | None:
    try:
        return stack.enter_context(contextlib.closing(find(gpu.uuid)))
    except CardError:
        return None


def _check_versions(
    facts: probes.DriverFacts, bindings: str | None, cards: list[NvmlCard]
) -> Check:
    version = ""
    with contextlib.suppress(CardError):
        version = f"{cards[0].driver_version()}, " if cards else ""
    detail = f"{version}CUDA {facts.cuda_version}"
    if not cards:
        detail += "; NVML does not answer, so what others use is not seen"
    if bindings is None:
        return Check("nvidia driver", "ok", detail)
    needs, has = bindings.partition(".")[0], facts.cuda_version.partition(".")[0]
    if needs.isdigit() and has.isdigit() and int(needs) > int(has):
        return Check("nvidia driver", "warn", f"{detail}; cuda-bindings {bindings} are for CUDA "
                     f"{needs}", f"Update the driver, or pip install 'cuda-bindings=={has}.*'",
                     )  # fmt: skip
    return Check("nvidia driver", "ok", f"{detail}; cuda-bindings {bindings}")


def _check_gpu(gpu: probes.Gpu) -> Iterator[Check]:
    name = f"gpu {gpu.index}"
    detail = f"{gpu.name}, {format_size(gpu.memory_bytes)}, {gpu.uuid}"
    if gpu.virtual_memory:
        shared = "can" if gpu.fd_handles else "cannot"
        yield Check(name, "ok", f"{detail}, {format_size(gpu.page_bytes)} pages that {shared} be "
                    "shared as file descriptors")  # fmt: skip
    else:
        yield Check(name, "warn", f"{detail}: no virtual memory management",
                    "A virtual GPU may need it switched on in its profile.")  # fmt: skip
    mode = _MODES.get(gpu.compute_mode)
    if mode is not None:
        harm = (
            "nobody can use it"
            if gpu.compute_mode == _PROHIBITED
            else "one process only, nobody shares"
        )
        yield Check(f"{name} mode", "warn", f"compute mode {mode}: {harm}",
                    f"sudo nvidia-smi -i {gpu.uuid} -c DEFAULT")  # fmt: skip


def _check_card(gpu: probes.Gpu, card: NvmlCard) -> tuple[int | None, list[Check]]:
    """Bytes free, if that is known, and what NVML says of the GPU."""
    name, checks = f"gpu {gpu.index}", []
    if card.has_mig():
        what = "a MIG slice" if card.is_slice else "MIG is on: CUDA uses a slice, not all of it"
        checks.append(Check(f"{name} mig", "info", f"{what}; each slice has a budget of its own"))
    try:
        memory, processes = card.memory(), card.processes()
    except CardError as error:
        return None, [*checks, Check(f"{name} memory", "info", f"not known: {error}")]
    detail = f"{format_size(memory.free)} of {format_size(memory.total)} free"
    by_size = sorted(processes.items(), key=lambda row: -(row[1] or 0))
    if by_size:
        more = len(by_size) - _MOST_SHOWN
        shown = ", ".join(_holder(*row) for row in by_size[:_MOST_SHOWN])
        detail += f"; held by {shown}" + (f" and {more} more" if more > 0 else "")
    return memory.free, [*checks, Check(f"{name} memory", "ok", detail)]


def _holder(pid: int, nbytes: int | None) -> str:
    name = probes.read_text(f"/proc/{pid}/comm") or "process"
    return f"{name} ({pid})" + ("" if nbytes is None else f" {format_size(nbytes)}")


def _check_costs(gpu: probes.Gpu, free: int | None, load: Callable[[], Driver]) -> Iterator[Check]:
    name = f"gpu {gpu.index} costs"
    if free is not None and free < _ROOM_TO_MEASURE:
        yield Check(name, "info", f"not measured: only {format_size(free)} are free")
        return
    try:
        found = costs.measure(gpu.uuid, load())
    except KvcachedError as error:
        yield Check(name, "warn", f"pages cannot be mapped: {error.message}", error.hint)
    except RuntimeError as error:  # cuda.bindings: the driver lacks a function, it is too old
        yield Check(name, "warn", f"pages cannot be mapped: {error}", "Update the driver.")
    else:
        yield Check(name, "ok", "; ".join(map(str, found)))
        yield Check(f"gpu {gpu.index} advice", "info", costs.advice(found))
