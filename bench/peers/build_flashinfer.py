"""Compile FlashInfer's modules for the rows of ``kernels.py``; needs nvcc, and no GPU.

``python bench/peers/build_flashinfer.py FOLDER``: where ``import flashinfer`` works, leaves
``FOLDER/flashinfer_modules``, to be named beside the package in ``kernels.py --peers FOLDER``.
Of the kernels of prefill only those over pages, causal or without a mask, are compiled; the others
are three quarters of the time and no row asks for them. The fa3 modules want cuRAND's headers.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

UNUSED = re.compile(r"ragged_\w*kernel|kernel_mask_[23]\.")
STUBS = {"libcuda.so": "libcuda.so.1"}
"""What is linked but lies with the driver."""


def specs() -> list[Any]:
    """What the wrappers of ``flashinfer_peers.py`` ask for, by head dimension and backend."""
    import torch
    from flashinfer.jit.attention import modules
    from flashinfer.jit.attention.variants import attention_sink_decl

    types = (torch.bfloat16,) * 3 + (torch.int32,)
    plain = (0, False, False)  # no positions, no window, no soft cap
    fa2 = modules._gen_batch_prefill_primary_module  # noqa: SLF001 - the one that its wrapper takes
    found = [fa2("fa2", *types, dim, dim, *plain, False) for dim in (64, 128, 256)]
    found += [modules.gen_batch_prefill_module("fa3", *types, dim, dim, *plain, False)
              for dim in (64, 128, 256)]  # fmt: skip
    found += [modules.gen_batch_mla_module(way, *types, 512, 64, False) for way in ("fa2", "fa3")]
    found.append(modules.gen_batch_decode_module(*types, 128, 128, *plain))
    found.append(modules.gen_customize_batch_prefill_module(
        "fa2", "batch_prefill_attention_sink_bf16_swa_False_fa2", *types, 64, 64,
        ["sink"], ["float"], ["sm_scale"], ["double"], "AttentionSink", attention_sink_decl["fa2"],
        paged_kv_stride_mode="independent", module_surface="full"))  # fmt: skip
    return found


def trimmed(text: str) -> str:
    """A ninja file that links without the unused kernels; what calls them is bound when called."""
    lines = []
    for line in text.replace("-lcuda $", "-lcuda -Wl,-z,lazy $").splitlines():
        words = line.split(" ")
        if "link" in words and line.startswith("build "):
            words = [word for word in words if not UNUSED.search(Path(word).name[-50:])]
        lines.append(" ".join(words))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build each module and put it where it is looked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    work = (options.folder / "build").resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name, soname in STUBS.items():
        subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", f"-Wl,-soname,{soname}",  # noqa: S607
                        "-o", str(work / name)], check=True)  # fmt: skip
    os.environ |= {"FLASHINFER_CUDA_ARCH_LIST": "9.0a", "FLASHINFER_WORKSPACE_BASE": str(work),
                   "FLASHINFER_EXTRA_LDFLAGS": f"-L{work}"}  # fmt: skip
    for spec in specs():
        spec.write_ninja()
        spec.ninja_path.write_text(trimmed(spec.ninja_path.read_text("utf-8")), "utf-8")
        library = spec.jit_library_path
        subprocess.run(["ninja", f"-j{options.jobs}", "-f", spec.ninja_path, library],  # noqa: S607
                       cwd=spec.build_dir, check=True)  # fmt: skip
        place = options.folder / "flashinfer_modules" / spec.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)
        print(f"{place}: {library.stat().st_size >> 10} KiB", flush=True)


if __name__ == "__main__":
    main()
