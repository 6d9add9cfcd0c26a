"""Triton kernels compiled without a GPU: what their code needs.

For programs of their own (``tests/unit/aot_*.py``): it needs a Triton that does not interpret.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget

from kvcached.kernels._fit import Target
from kvcached.kernels._launch import source_of

LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that a program may ask for, which at run time the driver says."""


def target_for(arch):
    """What tiles for ``sm_<arch>`` are chosen for."""
    return Target(LIMITS[arch], arch // 10, arch % 10)


def compile_for(arch, kernel, signature, constants, attributes, num_warps):
    """(PTX, registers, stack and shared bytes by name) of a kernel for ``sm_<arch>``."""
    compiled = triton.compile(
        source_of(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps},
    )  # fmt: skip
    return compiled.asm["ptx"], needs_of(compiled)


def needs_of(compiled):
    """Registers, stack and shared bytes by name of what Triton compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def serialized(ptx, arch):
    """Whether the assembler makes the products of warpgroups wait for one another, as it says."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run(
            [triton.knobs.nvidia.ptxas.path, "-v", f"-arch=sm_{arch}a", file.name, "-o",
             os.devnull], capture_output=True, text=True, check=True,
        )  # fmt: skip
    return "wgmma.mma_async instructions are serialized" in said.stdout + said.stderr


def wide_copies(ptx):
    """Asynchronous copies of 16 bytes."""
    return len(re.findall(r"cp\.async\.c[ga][^;]*, 0x10", ptx))


def print_reports(configurations, report):
    """The report of each configuration, for sm_90, as JSON."""
    json.dump({name: report(*one) for name, one in configurations(90).items()}, sys.stdout)
