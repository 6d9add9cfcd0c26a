"""Compiled kernels, kept by what they were compiled for, and called with addresses as integers.

Triton's own launch looks at every argument to find the kernel, and asks the driver about every
tensor. Here the caller knows: a kernel is compiled for explicit types and constants, the same that
the ahead-of-time tests compile, and its handle is called with integers. So a launch costs about a
microsecond of the host, and the base of a cache may be unmapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from kvcached.errors import InvalidInput

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
"""Triton's names of element types."""


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1`` before its import)."""
    return bool(triton.knobs.runtime.interpret)


def signature_of(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> Any:
    """What Triton compiles; arguments without a type or a value are ``i32``."""
    return {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }


def attributes_of(kernel: Any, aligned: tuple[str, ...]) -> dict[tuple[int], list[list[Any]]]:
    """What Triton is told of arguments that are multiples of 16."""
    return {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}


class Handle:
    """A compiled kernel on one device: ``handle(grid_x, grid_y, stream, *arguments)``.

    Arguments are those that are no constants, in order; integers for pointers. ``launch(x, y, z,
    stream, *fixed, *arguments)`` is what it calls.
    """

    __slots__ = ("compiled", "fixed", "launch")

    def __init__(self, compiled: Any, types: Mapping[str, str]) -> None:
        run = compiled.run  # loads the kernel onto the current device
        if run.global_scratch_size or run.profile_scratch_size:
            raise InvalidInput(f"{compiled.name} needs scratch memory, which no caller brings")
        self.compiled = compiled
        # Triton's launcher takes the constants too, and looks at each: a third of its time.
        given = {name: kind for name, kind in types.items() if kind != "constexpr"}
        source = SimpleNamespace(constants={}, signature=given, fn=compiled.src.fn)
        self.launch = triton.runtime.driver.active.launcher_cls(source, compiled.metadata).launch
        # cooperative, dependent launch, two scratch areas, sizes, metadata and hooks of profilers
        self.fixed = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
                      compiled.packed_metadata, None, None, None)  # fmt: skip

    def __call__(self, grid_x: int, grid_y: int, stream: int, *arguments: Any) -> None:
        self.launch(grid_x, grid_y, 1, stream, *self.fixed, *arguments)


_handles: dict[tuple[Any, ...], Handle] = {}


def handle_of(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    device: int,
    aligned: tuple[str, ...] = (),
) -> Handle:
    """The compiled kernel for ``types`` of pointers and scalars and for ``constants``.

    Arguments named by ``aligned`` are multiples of 16. Compiles at the first call, for the current
    device, which must be number ``device``.
    """
    key = (kernel, device, num_warps, aligned, tuple(types.items()), tuple(constants.items()))
    handle = _handles.get(key)
    if handle is None:
        signature = signature_of(kernel, types, constants)
        source = ASTSource(kernel, signature, dict(constants), attributes_of(kernel, aligned))
        compiled = triton.compile(source, options={"num_warps": num_warps})
        handle = _handles[key] = Handle(compiled, signature)
    return handle
