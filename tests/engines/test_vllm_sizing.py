"""How many addresses a vLLM gets, what is refused, and where its layers lie; with stand-ins."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace as Thing

import pytest

from kvcached.engines.vllm import sizing
from kvcached.engines.vllm.allocation import _common_bytes, place
from kvcached.engines.vllm.sizing import address_bytes, unsupported_config, unsupported_specs
from kvcached.errors import EngineUnsupported
from kvcached.layout import cdiv
from kvcached.testing import FakeBackend

GIB = 1 << 30


@dataclass
class Spec:
    """Of one layer: a block of ``block_size`` tokens."""

    page_size_bytes: int = 64 << 10
    block_size: int = 16
    num_kv_heads: int = 8


@dataclass
class MambaSpec:
    page_size_bytes: int = 64 << 10
    block_size: int = 16


def layers(count=32, **changes):
    return {f"layer.{i}": Spec(**changes) for i in range(count)}


def config(*, length=4096, seqs=256, **changes):
    parallel = {"distributed_executor_backend": "mp", "pipeline_parallel_size": 1}
    cache = {"kv_offloading_size": None, "cache_dtype": "auto"}
    model = {"max_model_len": length, "is_encoder_decoder": False, "enable_sleep_mode": False}
    rest = {"kv_transfer_config": changes.pop("kv_transfer_config", None)}
    for part in (parallel, cache, model):
        part.update({key: changes.pop(key) for key in list(changes) if key in part})
    parallel.update(changes)
    return Thing(
        parallel_config=Thing(**parallel), cache_config=Thing(**cache),
        model_config=Thing(**model), scheduler_config=Thing(max_num_seqs=seqs), **rest,
    )  # fmt: skip


# --- addresses --------------------------------------------------------------------------------


def blocks_in(nbytes, specs):
    return nbytes // sum(spec.page_size_bytes for spec in specs.values())


def test_addresses_for_all_that_could_be_in_use():
    specs = layers()
    nbytes = address_bytes(config(length=1024, seqs=80), specs, 8 * GIB, 0)
    assert blocks_in(nbytes, specs) == 1024 * 80 // 16


def test_all_of_the_device_can_hold_prefixes_however_few_requests_there_may_be():
    assert address_bytes(config(length=1024, seqs=8), layers(), 80 * GIB, 0) == 80 * GIB
    few = config(length=64, seqs=2)  # but not by more blocks than vLLM can look after
    assert address_bytes(few, layers(page_size_bytes=256), 80 * GIB, 0) == 256 * 32 << 18


def test_at_most_twice_the_memory_of_the_device():
    assert address_bytes(config(), layers(), 80 * GIB, 0) == 4096 * 256 * 128 << 10
    assert address_bytes(config(), layers(), 40 * GIB, 0) == 2 * 40 * GIB


def test_of_small_blocks_no_more_than_the_device_holds():
    specs = layers(page_size_bytes=1 << 10)  # 32 KiB a block: 2^18 of them are 8 GiB
    many = config(length=1 << 20, seqs=1024)
    assert address_bytes(many, specs, 80 * GIB, 0) == 80 * GIB
    assert address_bytes(many, specs, 6 * GIB, 0) == 8 * GIB
    assert address_bytes(many, specs, 2 * GIB, 0) == 4 * GIB


def test_what_the_user_says_counts_in_tokens():
    specs = layers()
    assert blocks_in(address_bytes(config(), specs, GIB, 1_600_000), specs) == 100_000


@pytest.mark.parametrize("block", [1, 16, 128])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000, 4095, 4096, 4097])
@pytest.mark.parametrize("tokens", [0, 1])
def test_a_request_of_full_length_always_fits_beside_the_null_block(length, block, tokens):
    specs = layers(3, block_size=block)
    nbytes = address_bytes(config(length=length, seqs=1), specs, 1, tokens)
    assert blocks_in(nbytes, specs) - 1 >= cdiv(length, block)


def test_it_fits_with_groups_of_different_block_sizes_too():
    small, large = layers(2, block_size=16), {"x": Spec(block_size=64), "y": Spec(block_size=64)}
    nbytes = address_bytes(config(length=1000, seqs=1), {**small, **large}, 1, 0)
    page, group = 64 << 10, 2  # two layers a group, so a block of either is two pages
    assert nbytes // (page * group) - 1 >= cdiv(1000, 16) + cdiv(1000, 64)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"distributed_executor_backend": "uni"}, ""),
        ({"distributed_executor_backend": "ray"}, "workers started by 'ray'"),
        ({"nnodes": 2}, "more than one machine"),
        ({"pipeline_parallel_size": 2}, ""),
        ({"data_parallel_size": 2}, "data parallelism of experts"),
        ({"data_parallel_size": 1, "data_parallel_index": 1}, ""),  # a replica on its own
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"kv_offloading_size": 1.5}, "KV offloading"),
        ({"is_encoder_decoder": True}, "encoder-decoder models"),
        ({"cache_dtype": "fp8_e4m3"}, ""),
        ({"cache_dtype": "int8_per_token_head"}, "scales per token and head"),
        ({"cache_dtype": "fp8", "enable_sleep_mode": True}, "sleep mode with an fp8 cache"),
        (
            {"nnodes": 2, "decode_context_parallel_size": 2},
            "more than one machine, decode context parallelism",
        ),
    ],
)
def test_choices_that_are_in_the_way(changes, why):
    assert unsupported_config(config(**changes)) == why


@pytest.mark.parametrize(
    ("specs", "why"),
    [
        (layers(), ""),
        ({}, "a model without KV cache"),
        ({**layers(), "m": MambaSpec()}, "layers of the kind MambaSpec"),
        (
            {**layers(), "l": Spec(128)},
            "layers with blocks of different sizes ([128, 65536] bytes)",
        ),
    ],
)
def test_layers_that_are_in_the_way(specs, why):
    assert unsupported_specs(specs) == why


def test_a_refusal_is_a_warning_or_if_strict_an_error(caplog, monkeypatch):
    monkeypatch.setattr(sizing, "_plan", None)
    away = config(decode_context_parallel_size=2)
    sizing.prepare(away, "layout", strict=False)
    assert sizing.plan() is None
    assert "not elastic: decode context parallelism is not supported" in caplog.text
    with pytest.raises(EngineUnsupported, match="cannot be made elastic: decode context"):
        sizing.prepare(away, "layout", strict=True)


# --- stages that have different layers --------------------------------------------------------


class World:
    """As vLLM's group of all workers; ``said``: what each of them has in its way."""

    def __init__(self, *said):
        self.said, self.heard = list(said), []

    def broadcast_object(self, obj=None, src=0):
        self.heard.append((src, obj))
        return self.said[src]


@pytest.fixture
def staged(monkeypatch):
    """Make a worker of rank 1 of a pipeline whose workers say this; its first wrapped method."""

    def make(*said, specs=None, strict=False, stages=2):
        world = World(*said)
        module = Thing(get_world_group=lambda: world)
        monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", module)
        there = config(pipeline_parallel_size=stages, world_size=len(said))
        there.cache_config.kv_cache_memory_bytes = 5 * GIB
        monkeypatch.setattr(sizing, "_wrap", lambda kind: None)
        monkeypatch.setattr(sizing, "_decide", lambda worker, plan, specs: 7 * GIB)
        sizing.prepare(there, "layout", strict=strict)

        class Worker:
            rank = 1

            def get_kv_cache_spec(self):
                return layers(2) if specs is None else specs

            def determine_available_memory(self):
                return there.cache_config.kv_cache_memory_bytes

        sizing._wrap_determine(Worker, "layout")
        return world, Worker()

    yield make
    sizing._plan = None


def test_stages_that_all_can_become_elastic_do(staged):
    world, worker = staged("", "", "")
    assert worker.determine_available_memory() == 7 * GIB
    assert world.heard == [(0, None), (1, ""), (2, None)]  # each says what it has, once
    assert sizing.plan() is not None


def test_what_one_stage_cannot_do_none_does(staged, caplog):
    """One scheduler looks after all: it hands out blocks that must be there in every worker."""
    mamba = "layers of the kind MambaSpec"
    _, worker = staged("", "", mamba, mamba)
    assert worker.determine_available_memory() == 5 * GIB  # what the user said
    assert sizing.plan() is None
    assert f"not elastic: {mamba} is not supported" in caplog.text
    _, worker = staged(mamba, "", strict=True)
    with pytest.raises(EngineUnsupported, match=mamba):
        worker.determine_available_memory()


def test_a_stage_says_what_is_in_its_way(staged):
    world, worker = staged("", "a model without KV cache", specs={})
    assert worker.determine_available_memory() == 5 * GIB
    assert (1, "a model without KV cache") in world.heard


def test_without_stages_nobody_is_asked(staged):
    world, worker = staged("never asked", "", stages=1)
    assert worker.determine_available_memory() == 7 * GIB
    assert world.heard == []


@pytest.mark.parametrize(("stages", "page"), [(1, 24 << 10), (2, 8 << 10)])
def test_all_stages_have_pages_of_one_size(stages, page):
    """On the CPU a page divides a block; blocks of three layers and of two have a layer alike."""
    plan = sizing.Plan(config(pipeline_parallel_size=stages), None, strict=True,
                       layer_bytes=8 << 10)  # fmt: skip
    assert _common_bytes(plan, 24 << 10) == page
    assert plan.staged is (stages > 1)


# --- where layers lie -------------------------------------------------------------------------

PAGE, BLOCKS = 4096, 10


@dataclass
class Tensor:
    """As vLLM's ``KVCacheTensor`` from 0.32 on."""

    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int = 0
    size: int = 0
    host_resident: bool = False


@dataclass
class CacheConfig:
    kv_cache_tensors: list[Tensor]
    num_blocks: int = BLOCKS
    asked: list[int] = field(default_factory=list)

    def backend(self, block):
        self.asked.append(block)
        return FakeBackend(PAGE)


def layer_by_layer(count, block, **changes):
    return Tensor([str(i) for i in range(count)], block * BLOCKS, block, **changes)


def starts(tensor, blocks=BLOCKS):
    return [[tensor.offset + i * tensor.layer_stride + b * tensor.block_stride
             for b in range(blocks)] for i in range(len(tensor.layers))]  # fmt: skip


def test_a_block_that_holds_all_layers_is_backed_by_itself():
    packed = Tensor(["a", "b", "c"], 1000, 3000, size=30_000)
    cache = CacheConfig([packed])
    (backend, geometry), moved = place(cache, cache.backend)
    assert (geometry.block_bytes, geometry.num_planes, geometry.num_blocks) == (3000, 1, BLOCKS)
    assert geometry.page_bytes == backend.page_bytes
    assert moved == [packed]
    assert cache.asked == [3000]


@pytest.mark.parametrize("block", [4096, 1000, 5000, 8192])
def test_layers_one_after_the_other_become_planes_of_whole_pages(block):
    cache = CacheConfig([layer_by_layer(3, block)])
    (_, geometry), (moved,) = place(cache, cache.backend)
    assert (geometry.block_bytes, geometry.num_planes) == (block, 3)
    assert moved.size == geometry.reserved_bytes
    for plane, found in enumerate(starts(moved)):
        base = plane * geometry.plane_bytes
        assert found == [base + b * block for b in range(BLOCKS)]
        assert base % PAGE == 0
    assert found[-1] + block <= geometry.reserved_bytes


def test_groups_that_lie_over_each_other_share_their_planes():
    plane = 4096 * BLOCKS
    first, second = layer_by_layer(2, 4096), layer_by_layer(2, 4096)
    late = layer_by_layer(1, 4096, offset=2 * plane)
    cache = CacheConfig([first, second, late])
    (_, geometry), moved = place(cache, cache.backend)
    assert geometry.num_planes == 3
    assert starts(moved[0]) == starts(moved[1])
    assert starts(moved[2])[0][0] == 2 * geometry.plane_bytes


@pytest.mark.parametrize("stride", [4096, 4096 * BLOCKS, 0])
def test_of_one_layer_alone_the_way_to_the_next_means_nothing(stride):
    cache = CacheConfig([Tensor(["a"], stride, 4096)])
    (_, geometry), (moved,) = place(cache, cache.backend)
    assert geometry.num_planes == 1
    assert starts(moved)[0] == [b * 4096 for b in range(BLOCKS)]


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ([layer_by_layer(2, 4096), layer_by_layer(2, 8192)], "of different sizes"),
        ([layer_by_layer(2, 4096, host_resident=True)], "of different sizes"),
        ([layer_by_layer(2, 4096, offset=100)], "do not follow each other"),
        ([replace(layer_by_layer(2, 4096), layer_stride=4096 * BLOCKS * 2)], "do not follow"),
    ],
)
def test_placements_that_are_refused(tensors, why):
    cache = CacheConfig(tensors)
    with pytest.raises(EngineUnsupported, match=why):
        place(cache, cache.backend)


@pytest.fixture
def kept(monkeypatch):
    """A list of what speaks against another layout here, of which the last holds."""
    reasons = [""]
    monkeypatch.setattr(sizing.layouts, "why_kept", lambda specs, config: reasons[-1])
    return reasons


def test_layouts_are_left_alone_where_any_stage_wants_that(staged, kept, caplog):
    """Of all workers alike, or vLLM ends: they must say the same."""
    caplog.set_level("INFO")
    world, worker = staged("", "", "")
    worker.vllm_config = "its configuration"
    assert not sizing._stays_as_it_lies(worker)
    assert world.heard == [(0, None), (1, ""), (2, None)]
    assert not caplog.records
    world.said[2] = "kernels read blocks in parts"
    assert sizing._stays_as_it_lies(worker)
    assert "own KV cache layout: kernels read blocks in parts" in caplog.text
    kept.append("CPU_MLA was not tried with another")
    sizing._stays_as_it_lies(worker)
    assert world.heard[-2] == (1, "CPU_MLA was not tried with another")


def test_layouts_are_left_alone_of_what_is_not_elastic(staged, monkeypatch, caplog):
    caplog.set_level("INFO")
    asked = Thing(why_kept=lambda specs, config: pytest.fail("asked of another vLLM's layers"))
    monkeypatch.setattr(sizing, "layouts", asked)
    _, worker = staged("", stages=1, specs={"m": MambaSpec()})
    assert sizing._stays_as_it_lies(worker)
    assert not caplog.records  # it will be said why it is not elastic
    monkeypatch.setattr(sizing, "_plan", None)
    assert sizing._stays_as_it_lies(worker)


def test_all_that_is_replaced_in_a_worker(monkeypatch):
    """Once a process; from 0.29 on workers are asked for layouts, before that nobody is."""
    done = []
    names = ("vllm.v1.worker.gpu_worker", "vllm.platforms", "vllm.v1.worker.cpu_worker")
    gpu, cpu = Thing(Worker=Thing(of="the GPU")), Thing(CPUWorker=Thing(of="the CPU"))
    platforms = Thing(current_platform=Thing(is_cpu=lambda: True))
    for name, module in zip(names, (gpu, platforms, cpu), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("_wrap_request", "_wrap_determine", "_wrap_sleep"):
        monkeypatch.setattr(sizing, name, lambda what, *_, name=name: done.append((name, what)))
    monkeypatch.setattr(sizing.allocation, "install", lambda kind, plan: done.append(kind))
    monkeypatch.setattr(sizing.layouts, "wrap", done.append)
    every = [("_wrap_request", gpu), ("_wrap_determine", gpu.Worker), ("_wrap_sleep", gpu.Worker),
             ("_wrap_determine", cpu.CPUWorker)]  # fmt: skip
    for kind, more in (("packed", []), ("layout", [sizing._stays_as_it_lies])):
        monkeypatch.setattr(sizing, "_wrapped", False)
        done.clear()
        sizing._wrap(kind)
        assert done == [*every, *more, kind]
        sizing._wrap(kind)
        assert len(done) == len(every) + len(more) + 1
