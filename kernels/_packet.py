"""``Packet``: the arguments of a launch in memory, as the CUDA driver reads them.

The driver takes an array with the address of each parameter of the kernel. A packet holds one, and
the memory of the arguments that are written anew for each launch; those that stay the same may lie
in another packet. Writing a packet is one call of ``struct``.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_CODES = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H",
          "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}  # fmt: skip
_MAP = "128s"
_SCRATCH = 2
"""Parameters that Triton puts behind: scratch memory of the kernel and of a profiler."""
_zero = ctypes.c_uint64(0)
_ZERO = ctypes.addressof(_zero)
"""Where parameters lie that no kernel here reads."""


def code_of(kind: str) -> str:
    """How ``struct`` writes an argument of a type of Triton's.

    A pointer is an address, a tensor map (``tensordesc<...>``) the 128 bytes of a ``CUtensorMap``.
    """
    if kind[0] == "*":
        return "Q"
    return _MAP if kind.startswith("tensordesc") else _CODES[kind]


def _sizes_behind(kind: str) -> int:
    """Parameters behind a tensor map: its sizes and strides, which the hardware does not need."""
    shape = re.match(r"tensordesc<[^[]*\[([^]]*)\]", kind)
    return 2 * len(shape[1].split(",")) if shape else 0


@dataclass(frozen=True, slots=True)
class Layout:
    """What a kernel takes: the ``struct`` codes of its arguments, and which parameters they are.

    ``parameters`` are all there are.
    """

    codes: tuple[str, ...]
    at: tuple[int, ...]
    parameters: int

    @classmethod
    def of(cls, kinds: Iterable[str]) -> Layout:
        """Of arguments of these types of Triton's, without the constants."""
        codes, at, parameters = [], [], 0
        for kind in kinds:
            codes.append(code_of(kind))
            at.append(parameters)
            parameters += 1 + _sizes_behind(kind)
        return cls(tuple(codes), tuple(at), parameters + _SCRATCH)

    def only(self, arguments: Sequence[int]) -> Layout:
        """The same kernel's, of some of its arguments."""
        some = [(self.codes[i], self.at[i]) for i in arguments]
        return Layout(tuple(code for code, _ in some), tuple(at for _, at in some), self.parameters)

    @property
    def format(self) -> str:
        """For ``struct``, each argument at its natural alignment."""
        return "@" + "".join(self.codes)

    @property
    def offsets(self) -> list[int]:
        """Where each argument lies in what ``format`` writes."""
        found, format_ = [], "@"
        for code in self.codes:
            format_ += code
            found.append(struct.calcsize(format_) - struct.calcsize("@" + code))
        return found


class Packet:
    """Memory of the arguments of a ``Layout``, for one launch at a time.

    They are written to ``values``. ``places`` are the addresses of all parameters, ``address`` is
    that of the same list for the driver; the others lie where they do in the packet ``beside``.
    """

    __slots__ = ("_kept", "address", "places", "values")

    def __init__(self, layout: Layout, beside: Packet | None = None) -> None:
        self.values = bytearray(struct.calcsize(layout.format))
        view = (ctypes.c_char * len(self.values)).from_buffer(self.values)
        start = ctypes.addressof(view)
        self.places: list[int] = [_ZERO] * layout.parameters
        if beside is not None:
            self.places[:] = beside.places
        for at, offset in zip(layout.at, layout.offsets, strict=True):
            self.places[at] = start + offset
        array = (ctypes.c_void_p * len(self.places))(*self.places)
        self._kept = view, array, beside
        self.address = ctypes.addressof(array)
