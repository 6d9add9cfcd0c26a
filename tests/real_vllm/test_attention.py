"""Our kernels as vLLM's attention: the tokens of stock vLLM, which has its own."""

from __future__ import annotations

import pytest
from real_vllm import rig

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
CHUNKS = {"max_num_batched_tokens": 256, "enable_chunked_prefill": True}


# A block of all layers, which is what we ask for and vLLM's own attention for the CPU refuses; and
# one for each layer, which a user may ask for.
@pytest.mark.parametrize(
    ("asked", "layout"),
    [({}, "BLNHC"),
     pytest.param({"VLLM_KV_CACHE_LAYOUT": "LBHNC"}, "LBHNC", marks=pytest.mark.slow)],
)  # fmt: skip
def test_tokens_are_those_of_vllms_own_attention(model, stock, run_dir, asked, layout):
    """In chunks, so that decodes and parts of prompts share steps; preempted now and then."""
    ours = rig.offline(model, run_dir, run_dir / "log", phases=rig.PHASES,
                       engine={"attention_backend": "CUSTOM"} | CHUNKS, KVCACHED="strict",
                       KVCACHED_CHECK="1", KVCACHED_LIMIT="12MiB",
                       VLLM_LOGGING_STREAM="ext://sys.stderr", **asked)  # fmt: skip
    assert f"Using {layout} KV cache layout" in (run_dir / "log").read_text(encoding="utf-8")
    assert [p["tokens"] for p in ours["phases"]] == [p["tokens"] for p in stock["phases"]]
