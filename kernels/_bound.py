"""``Launch``: a kernel with its grid and its arguments. ``Bound``: one whose tensors may change.

To describe a launch (sizes of tiles, parts, strides, the compiled kernel) takes the host many times
longer than the launch itself, and a model makes the same one for every token. So what a call needs
is described as a list of launches, each of which is queued at once or bound: then its arguments lie
in memory as the driver reads them, and a call writes the addresses of the tensors that differ.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvcached.kernels import _launch
from kvcached.kernels._launch import Handle, handle_of, interpreted
from kvcached.kernels._packet import Packet


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, the programs in x, y and z, and its arguments that are no constants, in order.

    Arguments are tensors, numbers, or ``None`` for a pointer that the kernel does not use. The
    tensors that only the kernel needs live as long as this.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    num_warps: int
    types: Mapping[str, str]
    handle: Handle | None

    def __call__(self) -> None:
        """Queue it on torch's current stream; the device must be the current one."""
        if self.handle is not None:
            stream = _launch.stream_of(self.handle.device)
            self.handle(self.grid, stream, *map(address_of, self.arguments))
            return
        # A pointer is needed even for what the kernel does not read; addresses go as numbers.
        some = next(x for x in self.arguments if isinstance(x, torch.Tensor))
        given = [some if x is None else x for x in self.arguments]
        for i, name in enumerate(self.kernel.arg_names[: len(given)]):
            if self.types.get(name) == "i64":
                given[i] = address_of(given[i])
        self.kernel[self.grid](*given, **self.constants, num_warps=self.num_warps)


def launch_of(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any],
    types: Mapping[str, str], device: torch.device, num_warps: int,
    may_align: frozenset[str] = frozenset(), **options: int,
) -> Launch:  # fmt: skip
    """A launch on ``device``; the arguments come first in the kernel.

    Those named by ``may_align`` are compiled as multiples of 16 if they are: so must be what takes
    their place. ``options`` are the compiler's.
    """
    handle = None
    if not interpreted():
        aligned = tuple(
            name
            for name, x in zip(kernel.arg_names, arguments, strict=False)
            if name in may_align and not address_of(x) % 16
        )
        handle = handle_of(kernel, types, constants, num_warps=num_warps, device=device.index,
                           aligned=aligned, **options)  # fmt: skip
    return Launch(kernel, grid, tuple(arguments), constants, num_warps, types, handle)


def address_of(x: Any) -> Any:
    """What the driver is given for an argument."""
    return x.data_ptr() if isinstance(x, torch.Tensor) else x or 0


class Bound:
    """A launch to be repeated with other tensors of the same layout and alignment.

    ``bound(stream, addresses)``: of what takes the place of ``given``, in that order: tensors, and
    numbers that the launch was described with. Other tensors are kept, those are not. May be called
    by several threads.
    """

    __slots__ = ("_fixed", "_handle", "_idle", "_kept", "_layout", "_pack", "_picks",
                 "_start", "_streams", "_success")  # fmt: skip

    def __init__(self, launch: Launch, given: Sequence[Any]) -> None:
        assert launch.handle is not None  # the interpreter binds nothing
        handle, arguments = launch.handle, launch.arguments
        order = {id(x): i for i, x in enumerate(given)}
        at = [i for i, x in enumerate(arguments) if id(x) in order]
        picks = [order[id(arguments[i])] for i in at]
        self._picks = None if picks == [*range(len(given))] else picks
        self._handle, self._start = handle, handle.starter(launch.grid)
        self._streams, self._success = handle.streams, handle.success
        self._kept = [
            x for x in arguments if isinstance(x, torch.Tensor) and id(x) not in order
        ]  # fmt: skip
        self._layout = handle.layout.only(at)
        self._pack = struct.Struct(self._layout.format).pack_into
        self._idle: list[Packet] = []
        self._fixed = Packet(handle.layout)
        handle.write(self._fixed, *map(address_of, arguments))

    def again(self, stream: int) -> None:
        """Launch with the tensors that it was made of, which must be alive."""
        on = self._streams.get(stream) or self._handle.stream(stream)
        result = self._start(on, self._fixed.address, 0)
        if result[0] is not self._success:
            self._handle.failed(result, self._start, on, self._fixed.address)

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        try:
            packet = self._idle.pop()
        except IndexError:
            packet = Packet(self._layout, self._fixed)
        if self._picks is not None:
            addresses = [addresses[i] for i in self._picks]
        self._pack(packet.values, 0, *addresses)
        on = self._streams.get(stream) or self._handle.stream(stream)
        result = self._start(on, packet.address, 0)
        if result[0] is not self._success:
            self._handle.failed(result, self._start, on, packet.address)
        self._idle.append(packet)
