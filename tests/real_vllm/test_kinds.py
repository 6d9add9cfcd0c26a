"""Windows beside full attention (Gemma-3), and MLA, whose kernels need vLLM's own order here."""

from __future__ import annotations

import random

import pytest
import torch
from real_vllm import rig, tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PHASES = [(4, 64), (12, 64)]


def prompts():
    """Token ids, since the model has no tokenizer: longer than its windows of 64 tokens."""
    rng = random.Random(0)
    return [
        [{"prompt_token_ids": [rng.randrange(2, 512) for _ in range(300)]} for _ in range(count)]
        for count, _ in PHASES
    ]


# What CPU_MLA computes depends on the batch, so there the engine is in the process that asks, and
# has all requests before its first step.
@pytest.mark.parametrize(
    ("kind", "more"), [("gemma3", {}), ("deepseek", {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})]
)
def test_models_of_other_kinds(tmp_path, run_dir, kind, more):
    arguments = tiny_llama.bench_module("models").make(kind, tmp_path / kind)
    model = arguments.pop("model")
    engine = arguments | {"enable_prefix_caching": False}
    del engine["seed"]  # the rig's own
    stock, ours = (
        rig.offline(model, run_dir, run_dir / f"log{mode}", phases=PHASES, engine=engine,
                    texts=prompts(), KVCACHED=mode, KVCACHED_CHECK="1",
                    **more)
        for mode in ("0", "strict")
    )  # fmt: skip
    for a, b in zip(stock["phases"], ours["phases"], strict=True):
        assert a["tokens"] == b["tokens"]
        assert len({tuple(tokens) for tokens in a["tokens"]}) == len(a["tokens"])
    report = ours["phases"][-1]["tenants"][0]["report"]
    assert report["backed_bytes"] == report["in_use_bytes"], "something was kept for nobody"


def test_experts_of_gpt_oss_bear_the_names_of_0_24(tmp_path):
    """Its loader takes what it finds in the file for names of its own parameters."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    load_file = pytest.importorskip("safetensors.torch").load_file
    layer = "model.layers.0.mlp."
    names = ["experts.gate_up_proj", "experts.down_proj_bias", "router.weight"]
    tensors = {layer + name: torch.full((2,), i) for i, name in enumerate(names)}
    save_file(tensors, tmp_path / "model.safetensors")
    tiny_llama.bench_module("models").rename_experts(tmp_path)
    found = {name: x[0].item() for name, x in load_file(tmp_path / "model.safetensors").items()}
    assert found == {layer + "experts.routed_experts.gate_up_proj": 0,
                     layer + "experts.routed_experts.down_proj_bias": 1,
                     layer + "router.weight": 2}  # fmt: skip
