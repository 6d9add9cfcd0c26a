"""Memory for partial results, and the counters that tell which part of a sequence comes last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Workspace:
    """Buffers of launches that run one after another; two at a time would mix up their parts.

    ``work`` is int32 ``[slots, 8]``: sequence, first key, end, part, parts (see ``plan.py``).
    ``partial`` and ``state`` (running maximum and sum of each row) are float32, their contents do
    not matter; ``finished`` are int32 counters that are zero before and after each launch.
    """

    work: torch.Tensor
    partial: torch.Tensor
    state: torch.Tensor
    finished: torch.Tensor
    addresses: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "addresses", tuple(x.data_ptr() for x in self.tensors))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order of the kernel's arguments."""
        return self.work, self.partial, self.state, self.finished

    def holds(self, items: int, elements: int, rows: int) -> bool:
        """Whether it is large enough."""
        sizes = self.finished.numel(), self.partial.numel(), self.state.numel()
        return bool(items <= sizes[0] and elements <= sizes[1] and 2 * rows <= sizes[2])


def make_workspace(
    items: int, elements: int, rows: int, device: torch.device, slots: int = 0
) -> Workspace:
    """Buffers for ``items`` counters, ``elements`` of partial results and ``rows`` of them."""
    kind = {"dtype": torch.float32, "device": device}
    return Workspace(
        torch.full((max(1, slots), 8), -1, dtype=torch.int32, device=device),
        torch.empty(max(1, elements), **kind), torch.empty(max(2, 2 * rows), **kind),
        torch.zeros(max(1, items), dtype=torch.int32, device=device),
    )  # fmt: skip


Memory = Callable[[int, int, int, torch.device], Workspace]
"""Where a launch gets its workspace: ``make_workspace``, ``workspace_of``, or a plan's."""


class Growing:
    """A ``Memory`` of calls that run one after another: what served one serves the next.

    What became too small is kept, since a captured graph may still use it.
    """

    def __init__(self, first: Workspace) -> None:
        self._held = [first]

    def __call__(self, items: int, elements: int, rows: int, device: torch.device) -> Workspace:
        """The first that is large enough."""
        for held in self._held:
            if held.holds(items, elements, rows):
                return held
        self._held.append(make_workspace(2 * items, 2 * elements, 2 * rows, device))
        return self._held[-1]


_kept: dict[tuple[int, int], Workspace] = {}


def workspace_of(items: int, elements: int, rows: int, device: torch.device) -> Workspace:
    """A workspace for a launch on the current stream.

    Launches of one stream run one after another, so they share one that grows as needed. A captured
    graph may be replayed on any stream, beside others: while capturing, the memory is the graph's
    own, which costs it a fill with zeros; a ``Plan`` costs nothing.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return make_workspace(items, elements, rows, device)
    key = device.index, torch.cuda.current_stream(device).cuda_stream
    kept = _kept.get(key)
    if kept is None or not kept.holds(items, elements, rows):
        kept = _kept[key] = make_workspace(2 * items, 2 * elements, 2 * rows, device)
    return kept
