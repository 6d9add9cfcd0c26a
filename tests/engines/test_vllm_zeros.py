"""What vLLM allocates for its cache, and cuts into views, lies over our addresses."""

from __future__ import annotations

import pytest
import torch

from kvcached.engines.vllm.allocation import in_place_of_zeros
from kvcached.errors import EngineUnsupported

RAW = torch.arange(64, dtype=torch.int8)


def test_the_first_of_its_size_is_ours_and_what_is_cut_out_of_it():
    with in_place_of_zeros(RAW, 48):
        small = torch.zeros(8, dtype=torch.int8)
        whole = torch.zeros(50, dtype=torch.int8, device="cpu")
        view = torch.as_strided(whole, (2, 8), (24, 1), 3)
        other = torch.zeros(50, dtype=torch.int8)
    assert whole.data_ptr() == RAW.data_ptr() and len(whole) == 50
    assert view[1].tolist() == list(range(27, 35))
    assert not small.any() and not other.any()
    assert not torch.zeros(50).any()


@pytest.mark.parametrize("make", [lambda: torch.zeros(8), lambda: torch.empty(64),
                                  lambda: torch.zeros((8, 8))])  # fmt: skip
def test_a_cache_that_is_made_otherwise_is_an_error(make):
    said = pytest.raises(EngineUnsupported, match=r"something else than torch\.zeros")
    with said, in_place_of_zeros(RAW, 48):
        make()


def test_what_goes_wrong_inside_is_what_is_raised():
    with pytest.raises(KeyError), in_place_of_zeros(RAW, 48):
        raise KeyError
