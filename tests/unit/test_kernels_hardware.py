"""What a GPU must be able to do is said before anything is compiled for it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kvcached.errors import InvalidInput  # noqa: E402
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
