"""What a GPU must be able to do is said before anything is compiled for it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kvcached.errors import InvalidInput  # noqa: E402
from kvcached.kernels.mla import check_mla, is_wide  # noqa: E402
from kvcached.kernels.quant import require_hardware  # noqa: E402

CARD = torch.device("cuda", 0)


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))


@pytest.mark.usefixtures("ampere")
def test_fp8_is_refused_by_name_where_there_are_no_instructions_for_it():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(InvalidInput, match=r"8\.9 or more; this one has 8\.0"):
            require_hardware(dtype, CARD)
    for dtype in (torch.int8, torch.uint8, torch.bfloat16, torch.float32):
        require_hardware(dtype, CARD)
    require_hardware(torch.float8_e4m3fn, torch.device("cpu"))


def test_a_hopper_takes_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    require_hardware(torch.float8_e4m3fn, CARD)


def latents(dtype=torch.bfloat16, dim=576, dim_v=512, offset=0, pad=0):
    """A checked call over latents; ``offset`` elements from an aligned address, rows apart."""
    memory = torch.zeros(4 * 64 * (dim + pad) + offset, dtype=dtype)[offset:]
    cache = memory.as_strided((4, 64, dim), (64 * (dim + pad), dim + pad, 1))
    q = torch.zeros(2, 128, dim, dtype=dtype)
    table, lens = torch.tensor([[0, 1], [2, 3]]).int(), torch.tensor([100, 3]).int()
    return check_mla(q, cache, table, lens, dim_v, 0.1)


def test_warpgroups_take_latents_of_deepseeks_sizes_that_lie_aligned(monkeypatch):
    pytest.importorskip("triton")
    assert not is_wide(latents()), "no Hopper"
    monkeypatch.setattr("kvcached.kernels._launch.runs_gluon", lambda _: True)
    assert is_wide(latents())
    assert is_wide(latents(torch.float16, pad=64))
    for other in (latents(torch.float32), latents(dim=320, dim_v=256), latents(dim=512),
                  latents(offset=4), latents(pad=8)):  # fmt: skip
        assert not is_wide(other)


def test_only_hopper_has_the_instructions_of_warpgroups(monkeypatch):
    pytest.importorskip("triton")
    from kvcached.kernels._launch import runs_gluon

    for major, minor in ((8, 0), (9, 0), (10, 0), (12, 0)):
        runs_gluon.cache_clear()
        capability = (major, minor)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, it=capability: it)
        assert runs_gluon(CARD) == (major == 9)
        assert not runs_gluon(torch.device("cpu"))
    runs_gluon.cache_clear()
