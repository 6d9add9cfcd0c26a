"""Tiles fit the shared memory of every GPU that is supported, and an H100 keeps its own."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from other_python import ROOT, run_python

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from kvcached.errors import BackendUnavailable  # noqa: E402
from kvcached.kernels import _fit, _launch, _sizes  # noqa: E402
from kvcached.kernels._fit import HOPPER, Target, fit_tiles, tile_bytes  # noqa: E402
from kvcached.kernels.mla import mla_config  # noqa: E402
from kvcached.kernels.prefill import tile_config, warps_of  # noqa: E402

LIMITS = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448,
          (12, 0): 101_376}  # fmt: skip
"""Bytes of shared memory a program, by compute capability."""
TARGETS = [Target(limit, *capability) for capability, limit in LIMITS.items()]
BOUNDLESS = Target(1 << 40, 9)
CARD = torch.device("cuda", 3)


def decoding(target, group, dim, max_q, dtype, stored):
    """(sizes, bytes) of ``attend_kernel``."""
    sizes = _sizes.tile_config(group, dim, dim, max_q, dtype, stored, target)
    row = _fit.row_bytes(sizes["DP"], sizes["DVP"], stored) + 8 * (stored.itemsize == 1)
    width = sizes["DP"] * (2 if stored == torch.uint8 else 1)
    return sizes, tile_bytes(sizes, target, row=row, dim=width, itemsize=dtype.itemsize)


def prefilling(target, group, dims, itemsize, longest):
    """The same of ``prefill_kernel``."""
    sizes = tile_config(group, *dims, itemsize, varlen=True, longest=longest, target=target)
    dim, dim_v = sizes["DA"] + sizes["DB"], sizes["VA"] + sizes["VB"]
    return sizes, tile_bytes(sizes, target, row=(dim + dim_v) * itemsize, dim=dim,
                             itemsize=itemsize)  # fmt: skip


def latent(target, rows, itemsize, *, in_bytes=False):
    """The same of ``mla_kernel``."""
    sizes = mla_config(rows, 576, 512, itemsize, target, in_bytes=in_bytes)
    row = 576 * (1 if in_bytes else itemsize)
    return sizes, tile_bytes(sizes, target, row=row, dim=576, itemsize=itemsize)


def all_sizes(target):
    """(shape, sizes, bytes) of what is in use."""
    bf16, fp32 = torch.bfloat16, torch.float32
    kinds = [(bf16, bf16), (bf16, torch.int8), (bf16, torch.uint8), (fp32, fp32),
             (bf16, torch.float8_e4m3fn)]  # fmt: skip
    for group, dim, max_q, kind in itertools.product(
        (1, 4, 5, 8, 16, 32), (64, 80, 96, 128, 192, 256), (1, 4, 99), kinds
    ):
        yield (group, dim, max_q, kind), *decoding(target, group, dim, max_q, *kind)
    dims = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
    for group, pair, itemsize, longest in itertools.product(
        (1, 4, 32), dims, (2, 4), (99, 1 << 20)
    ):
        yield (group, pair, itemsize), *prefilling(target, group, pair, itemsize, longest)
    for rows, itemsize in itertools.product((1, 16, 20, 32, 64, 128, 512), (2, 4)):
        yield (rows, itemsize), *latent(target, rows, itemsize)
        yield (rows, "bytes"), *latent(target, rows, 2, in_bytes=True)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"sm_{target.major}{target.minor}")
def test_tiles_of_every_shape_fit_every_gpu(target):
    for shape, sizes, needed in all_sizes(target):
        assert needed <= target.shared, (shape, sizes)
        assert sizes["STAGES"] >= 2, (shape, sizes)
        assert sizes["BN"] >= 16, (shape, sizes)


def test_an_h100_keeps_the_tiles_that_were_tuned_on_it():
    for (shape, tuned, _), (_, sizes, _) in zip(
        all_sizes(BOUNDLESS), all_sizes(HOPPER), strict=True
    ):
        assert sizes == tuned, shape
    assert [latent(HOPPER, rows, 2)[0]["BM"] for rows in (16, 128)] == [16, 64]
    sizes, _ = prefilling(HOPPER, 4, (128, 128), 2, 1 << 20)
    assert (sizes["BM"], sizes["BN"], sizes["STAGES"]) == (128, 128, 3)


def test_fewer_stages_come_before_smaller_tiles():
    sizes = {"BM": 16, "BN": 64, "STAGES": 4}
    least = {"STAGES": 2, "BN": 16}
    asked = [fit_tiles(sizes, Target(limit, 8, 6), least, row=512, dim=128, itemsize=2)
             for limit in (200_000, 101_376, 72_000, 45_000, 30_000, 1000)]  # fmt: skip
    found = [(one["STAGES"], one["BN"]) for one in asked]
    assert found == [(4, 64), (3, 64), (2, 64), (2, 64), (2, 32), (2, 16)]
    assert sizes == {"BM": 16, "BN": 64, "STAGES": 4}, "left as they were"


def test_the_bytes_that_are_reckoned_with_are_those_that_the_compiler_takes():
    result = json.loads((ROOT / "bench/results/kernels_compiled.json").read_text(encoding="utf-8"))
    rows = {(row["kernel"], row["arch"]): row["shared"] for row in result["rows"]}
    for target in TARGETS:
        arch = f"sm_{target.major}{target.minor}"
        if target.minor == 6:  # the code of 8.0 with the limit of 8.9
            continue
        for name, (_, needed) in {
            "attend bf16 128 decode": decoding(target, 4, 128, 1, torch.bfloat16, torch.bfloat16),
            "attend bf16 256 MQA": decoding(target, 32, 256, 1, torch.bfloat16, torch.bfloat16),
            "attend int8 128 by row": decoding(target, 4, 128, 1, torch.bfloat16, torch.int8),
            "attend int4 128 by row": decoding(target, 4, 128, 1, torch.bfloat16, torch.uint8),
            "attend bf16 128 prefill": decoding(target, 4, 128, 99, torch.bfloat16, torch.bfloat16),
            "prefill bf16 64": prefilling(target, 4, (64, 64), 2, 1 << 20),
            "prefill bf16 128": prefilling(target, 4, (128, 128), 2, 1 << 20),
            "prefill bf16 256": prefilling(target, 4, (256, 256), 2, 1 << 20),
            "mla bf16 16 heads": latent(target, 16, 2),
            "mla bf16 128 heads": latent(target, 128, 2),
            "mla fp32 16 heads": latent(target, 16, 4),
            "mla int8 16 heads": latent(target, 16, 2, in_bytes=True),
        }.items():
            # Copies of queries and weights may turn out to be needless; of MLA on Hopper, which has
            # room for it, weights of 4 KiB are kept.
            kept = 4096 if (name, arch) == ("mla bf16 128 heads", "sm_90") else 0
            assert needed / 2 < rows[name, arch] <= needed + kept, (name, arch)


def test_no_shipped_configuration_asks_for_more_than_its_gpu_has():
    result = json.loads((ROOT / "bench/results/kernels_compiled.json").read_text(encoding="utf-8"))
    limits = {f"sm_{major}{minor}": limit for (major, minor), limit in LIMITS.items()}
    assert {row["arch"] for row in result["rows"]} == set(limits) - {"sm_86"}
    for row in result["rows"]:
        assert row["shared"] <= limits[row["arch"]], row


def test_warps_are_more_where_they_make_the_products():
    for target in TARGETS:
        sizes = tile_config(4, 64, 64, 2, varlen=True, target=target)
        assert warps_of(sizes, 2, plain=True, target=target) == (8 if target.by_warp else 4)


@pytest.fixture
def turing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    _launch.target_of.cache_clear()


@pytest.mark.usefixtures("turing")
def test_an_old_gpu_is_refused_before_anything_is_compiled_for_it():
    with pytest.raises(BackendUnavailable, match=r"8\.0 or more \(Ampere\); this one has 7\.5"):
        _launch.target_of(CARD)
    with pytest.raises(BackendUnavailable, match=r"this one has 7\.5"):
        _launch.handle_of("never compiled", {}, {}, device=3)
    assert _launch.target_of(torch.device("cpu")) == HOPPER


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kernels_compile_for_other_gpus_within_their_shared_memory():
    said = run_python(str(Path(__file__).with_name("archs_report.py")), timeout=280)
    compiled = json.loads(said)
    assert len(compiled) == 20
    for name, needs in compiled.items():
        assert needs["shared"] <= needs["limit"], (name, needs)
        assert needs["stack"] <= 64, f"{name} spills: {needs}"
