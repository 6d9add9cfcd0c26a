"""Compile a few configurations for GPUs other than Hopper, without one; print their needs as JSON.

Those that ask for the most of each architecture; ``bench/kernels_compiled.py`` compiles them all.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import aot_moves
import aot_prefill_mla
import aot_report
from ahead_of_time import LIMITS

CHOSEN = {
    80: ["prefill bf16 128", "mla bf16 128 heads", "attend bf16 128 decode"],
    89: ["prefill bf16 64", "prefill bf16 256", "mla bf16 16 heads", "mla e4m3 16 heads",
         "attend bf16 128 verify",
         "attend e4m3 128 by row", "append bf16 128", "append e4m3 128 by row",
         "gather e4m3 128 as bf16", "merge 4 of 128", "copy"],
    100: ["prefill bf16 128", "mla bf16 128 heads", "attend bf16 128 prefill"],
    120: ["prefill bf16 128", "attend bf16 128 MQA early", "attend bf16 128 cluster"],
}  # fmt: skip
"""Names by architecture."""

if __name__ == "__main__":
    found = {}
    for arch, names in CHOSEN.items():
        for module in (aot_prefill_mla, aot_report, aot_moves):
            for name, one in module.configurations(arch).items():
                if name in names:
                    needs = module.report(*one, arch=arch)
                    found[f"sm_{arch} {name}"] = needs | {"limit": LIMITS[arch]}
    json.dump(found, sys.stdout)
