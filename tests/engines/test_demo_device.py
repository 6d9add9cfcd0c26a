"""What the demo does differently on a GPU, as far as it can be tried without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import make_model, make_tokenizer

from kvcached.demo.device import choose, describe, find_device, page_bytes
from kvcached.demo.engine import shared_page
from kvcached.demo.run import _check_budget, _fitting_budget
from kvcached.demo.speed import measure, through_engine
from kvcached.demo.workload import CPU, GPU, PROMPTS, Scale, extra_burst, make_workload, scale_of
from kvcached.engines.transformers_batch import upload
from kvcached.errors import BackendUnavailable, InvalidInput, UnknownName
from kvcached.layout import CacheSpec

MIB = 1 << 20
# SmolLM2-135M in float32 on a GPU
SIZES = {"token": 46080, "block": 16 * 46080, "block_size": 16, "page": 2 * MIB}
has_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


# --- which device -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "index", "gpus", "device"),
    [("auto", 0, 0, "cpu"), ("auto", 0, 2, "cuda:0"), ("cuda", 0, 1, "cuda:0"),
     ("cuda", 1, 2, "cuda:1")],
)  # fmt: skip
def test_the_device_is_what_was_asked_for(kind, index, gpus, device):
    assert choose(kind, index, gpus) == device


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(BackendUnavailable, match="doctor"):
        choose("cuda", 0, 0)
    with pytest.raises(UnknownName, match="sees 1"):
        choose("cuda", 1, 1)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cpu:0", "auto:1", "cuda:-1"])
def test_other_names_are_refused(name):
    with pytest.raises(InvalidInput, match="--device"):
        find_device(name)


@has_no_gpu
def test_without_a_gpu_auto_is_the_cpu_and_cuda_says_what_to_do():
    assert find_device("cpu") == find_device("auto") == "cpu"
    with pytest.raises(BackendUnavailable, match="--device cpu"):
        find_device("cuda")


def test_of_the_cpu_nothing_is_said_and_pages_divide_blocks():
    assert describe("cpu") == {}
    spec = CacheSpec(30, 3, 64, "float32", block_size=16)
    page = page_bytes("cpu", spec)
    assert shared_page(spec.block_bytes, page) == 0
    assert shared_page(spec.block_bytes, 2 * MIB) == 2 * MIB


# --- what is asked of it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_a_gpu_gets_more_and_longer_requests():
    assert scale_of("cpu") == CPU
    assert scale_of("cuda:1") == GPU


def test_prompts_of_a_burst_differ(tokenizer):
    workload = make_workload(tokenizer, seed=0, seconds=2, scale=GPU)
    burst = workload.requests[: GPU.burst]
    assert {request.engine for request in burst} == {"chat"}
    assert len({request.tokens for request in burst}) == GPU.burst
    low, high = GPU.output_tokens
    assert all(low <= request.max_new_tokens <= high for request in burst)
    text = tokenizer.decode(burst[0].tokens)
    assert sum(prompt in text for prompt in PROMPTS["chat"]) == GPU.questions
    more = extra_burst(tokenizer, seed=0, engine="chat", first_id=99, scale=GPU)
    assert [request.id for request in more] == list(range(99, 99 + GPU.burst))


def test_a_split_budget_is_two_halves_of_whole_pages_too_small_for_a_burst(tokenizer):
    workload = make_workload(tokenizer, seed=0, seconds=2, scale=GPU)
    budget = _fitting_budget(workload, SIZES)
    burst = workload.burst_blocks(16) * SIZES["block"]
    assert budget % (2 * SIZES["page"]) == 0
    assert budget // 2 < burst < budget - 3 * SIZES["page"]
    _check_budget(workload, budget, SIZES)


def test_a_request_needs_room_for_the_pages_that_it_shares(tokenizer):
    workload = make_workload(tokenizer, seed=0, seconds=2)
    own = {**SIZES, "page": 16 << 10}
    longest = max(len(r.tokens) + r.max_new_tokens for r in workload.requests)
    enough = 2 * (-(-longest // 16) + 2) * SIZES["block"]
    _check_budget(workload, enough, own)
    with pytest.raises(InvalidInput, match="--budget"):
        _check_budget(workload, enough, SIZES)


def test_speed_is_measured_through_an_engine_or_by_plain_passes():
    model = make_model(attention="kvcached")
    model.generation_config.eos_token_id = 256
    scale = Scale(burst=3)
    for speed in (through_engine(model, "cpu", scale), measure(model, "cpu", scale)):
        assert set(speed) == {"prompt_token", "step"}
        assert all(seconds > 0 for seconds in speed.values())


# --- what goes to it ----------------------------------------------------------------------------


def test_arrays_go_in_one_copy_each_at_a_round_address():
    arrays = [np.arange(5), np.zeros((2, 3), np.int32) + 7, np.empty(0, np.int64), np.array([9])]
    sent = upload(arrays, "cpu")
    for array, tensor in zip(arrays, sent, strict=True):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.data_ptr() % 16 == 0 or not tensor.numel()
    assert len({tensor.untyped_storage().data_ptr() for tensor in sent}) == 1


def test_arrays_land_on_the_device_that_was_named():
    sent = upload([np.arange(5), np.zeros((2, 3))], "meta")
    assert [(tensor.device.type, tuple(tensor.shape)) for tensor in sent] == [
        ("meta", (5,)), ("meta", (2, 3)),
    ]  # fmt: skip
