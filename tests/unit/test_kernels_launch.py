"""The launch path: compiled for a named GPU, loaded and launched by the driver, no C compiler."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_launches import FakeLaunches
from other_python import run_python

pytest.importorskip("triton")
pytest.importorskip("torch")
from kvcached.errors import BackendUnavailable, DriverError, InvalidInput
from kvcached.kernels import _launch
from kvcached.kernels._packet import Layout, Packet
from kvcached.memory.driver import Calls
from kvcached.testing.fake_device import CUresult

TYPES = {"A": "*bf16", "B": "i64", "n": "i32", "scale": "fp32", "SIZE": "constexpr"}
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_kernel_needs_a_compiler_of_c_or_asks_tritons_driver(tmp_path):
    note = tmp_path / "called"
    for name in COMPILERS:
        trap = tmp_path / "bin" / name
        trap.parent.mkdir(exist_ok=True)
        trap.write_text(f'#!/bin/sh\necho {name} >> "{note}"\nexit 1\n')
        trap.chmod(0o755)
    here = {"PATH": str(tmp_path / "bin"), "TRITON_CACHE_DIR": str(tmp_path / "cache"), "CC": ""}
    assert shutil.which("gcc", path=here["PATH"]), "the trap is set"
    said = json.loads(run_python(str(Path(__file__).with_name("launch_path.py")), timeout=280,
                                 **here))  # fmt: skip
    assert not note.exists(), note.read_text()
    assert not said["asked_triton"]
    assert {one["name"] for one in said["kernels"]} == {
        "attend_kernel", "prefill_kernel", "merge_kernel", "mla_kernel", "plan_kernel",
        "append_kernel", "append_quant_kernel", "copy_kernel", "compact_kernel", "gather_kernel",
        "gather_wide_kernel",
    }  # fmt: skip
    for one in said["kernels"]:
        assert one["takes"], f"{one['name']} is given other types than its code takes"
        assert one["as_compiled"], one["name"]
        assert (one["launches"], one["scratch"], one["streams"]) == (1, [[0, 0]], [77]), one
    assert said["dynamic"]["attend_kernel"] > 48 << 10, "more than a program gets unasked"
    assert said["dynamic"]["append_kernel"] is None


@pytest.fixture
def driver(monkeypatch):
    driver = FakeLaunches(lambda _: Layout.of(("*bf16", "i64", "i32", "fp32")))
    monkeypatch.setattr(_launch, "driver_calls", lambda: Calls(driver))
    monkeypatch.setattr(_launch, "_context", lambda device: 1000 + device)
    return driver


def handle(*, shared=100, pdl=False, scratch=0, device=1, types=TYPES, ctas=1, **starts):
    needs = SimpleNamespace(
        name="kernel", num_warps=4, num_ctas=ctas, shared=shared, launch_pdl=pdl,
        global_scratch_size=scratch, profile_scratch_size=0,
    )  # fmt: skip
    compiled = SimpleNamespace(metadata=needs, asm={"cubin": b"code of kernel"})
    return _launch.Handle(compiled, types, device, **starts)


def test_arguments_are_written_as_their_types_say_at_their_alignment():
    layout = Layout.of(("i32", "*bf16", "i8", "i64", "fp32"))
    assert layout.format == "@iQbqf"
    assert layout.offsets == [0, 8, 16, 24, 32]
    assert (layout.at, layout.parameters) == ((0, 1, 2, 3, 4), 7), "and two for scratch memory"


def test_a_tensor_map_is_128_bytes_and_its_sizes_and_strides_are_nobodys(driver):
    layout = Layout.of(("i32", "tensordesc<bf16[1, 16, 64],Shared(bits=[8, 4])>", "*fp32"))
    assert layout.codes == ("i", "128s", "Q")
    assert (layout.at, layout.parameters) == ((0, 1, 8), 11)
    driver.layout_of = lambda _: layout
    words = bytes(range(128))
    kinds = {"n": "i32", "MAP": "tensordesc<bf16[1, 16, 64],Shared(bits=[8, 4])>", "A": "*fp32"}
    handle(types=kinds)((1,), 0, 7, words, 9)
    (launched,) = driver.launches
    assert launched.arguments == (7, words, 9)
    assert launched.others == (0,) * 8


def test_a_launch_has_the_grid_the_stream_and_the_arguments_that_it_was_given(driver):
    run = handle()
    run((3, 2), 9, 1 << 63, -5, 7, 0.5)
    run((4,), 0, 1, 2, 3, 4.0)
    first, second = driver.launches
    assert first.function == ("kernel", 1)
    assert (first.grid, first.threads, first.shared) == ((3, 2, 1), 128, 100)
    assert (first.stream, first.arguments, first.others) == (9, (1 << 63, -5, 7, 0.5), (0, 0))
    assert (second.grid, second.stream, second.arguments) == ((4, 1, 1), 0, (1, 2, 3, 4.0))
    run((0, 2), 9, 1, 2, 3, 4.0)
    assert len(driver.launches) == 2, "no programs, no launch"


def test_a_kernel_is_loaded_into_the_context_of_its_device_and_no_other_stays_current(driver):
    driver.contexts.append(5)
    seen = []
    load = driver.cuModuleLoadData
    driver.cuModuleLoadData = lambda image: seen.append(driver.contexts[-1]) or load(image)
    handle(device=3)
    assert seen == [1003]
    assert driver.contexts == [5]


def test_more_shared_memory_than_a_program_gets_is_asked_for_or_refused(driver):
    handle(shared=49152)
    assert not driver.dynamic
    handle(shared=200_000)
    assert driver.dynamic == {("kernel", 2): 200_000}
    with pytest.raises(BackendUnavailable, match=r"needs 300000 bytes.*has 232448"):
        handle(shared=300_000)


def test_a_kernel_that_needs_scratch_memory_or_a_cluster_is_refused(driver):
    with pytest.raises(InvalidInput, match="scratch"):
        handle(scratch=128)
    with pytest.raises(InvalidInput, match="clusters"):
        handle(ctas=2)
    assert not driver.images


def test_a_dependent_launch_may_begin_early(driver):
    handle(pdl=True)((2, 1, 3), 9, 1, 2, 3, 4.0)
    (launched,) = driver.launches
    assert launched.early
    assert (launched.grid, launched.threads, launched.shared, launched.stream) == (
        (2, 1, 3), 128, 100, 9
    )  # fmt: skip
    assert launched.arguments == (1, 2, 3, 4.0)


def test_dependent_launches_on_two_streams_do_not_mix(driver):
    start = handle(pdl=True)
    repeat, packet = start.starter((5,)), Packet(start.layout)
    start.write(packet, 1, 2, 3, 4.0)
    for stream in (9, 1 << 40, 9):
        repeat(start.stream(stream), packet.address, 0)
    assert [one.stream for one in driver.launches] == [9, 1 << 40, 9]
    assert {one.grid for one in driver.launches} == {(5, 1, 1)}


@pytest.mark.parametrize("pdl", [False, True])
def test_programs_may_run_in_clusters_and_have_memory_to_spare(driver, pdl):
    handle(pdl=pdl, cluster=4, least_shared=60_000)((8, 3), 9, 1, 2, 3, 4.0)
    (launched,) = driver.launches
    assert (launched.cluster, launched.early) == (4, pdl)
    assert (launched.grid, launched.shared) == ((8, 3, 1), 60_000)
    assert driver.dynamic == {("kernel", 1): 60_000}, "more than a program gets unasked"
    handle(shared=200, least_shared=100)((1,), 9, 1, 2, 3, 4.0)
    assert (driver.launches[-1].shared, driver.launches[-1].cluster) == (200, 1)


def test_a_launch_that_the_driver_refuses_says_which_and_why(driver):
    run = handle()
    driver.fail_with = [CUresult.CUDA_ERROR_ILLEGAL_ADDRESS]
    with pytest.raises(DriverError, match=r"cuLaunchKernel of kernel.*CUDA_ERROR_ILLEGAL") as info:
        run((1,), 0, 1, 2, 3, 4.0)
    assert info.value.status == "CUDA_ERROR_ILLEGAL_ADDRESS"
    run((1,), 0, 1, 2, 3, 4.0)
    assert len(driver.launches) == 1


def test_a_number_that_its_type_does_not_hold_launches_nothing(driver):
    run = handle()
    for arguments in ((1, 2, 1 << 31, 4.0), (-1, 2, 3, 4.0), (1, 2, 3)):
        with pytest.raises(InvalidInput, match="kernel cannot take its arguments"):
            run((1,), 0, *arguments)
    assert not driver.launches


def test_a_thread_without_a_context_gets_that_of_the_device_but_keeps_another(driver):
    run = handle(device=2)
    driver.fail_with = [CUresult.CUDA_ERROR_INVALID_CONTEXT]
    run((1,), 0, 1, 2, 3, 4.0)
    assert driver.contexts == [1002]
    assert len(driver.launches) == 1
    driver.contexts[:] = [5]
    driver.fail_with = [CUresult.CUDA_ERROR_INVALID_CONTEXT]
    with pytest.raises(DriverError, match="INVALID_CONTEXT"):
        run((1,), 0, 1, 2, 3, 4.0)
    assert driver.contexts == [5]


def test_threads_do_not_write_to_each_others_arguments(driver):
    run, barrier = handle(), threading.Barrier(2)
    record = driver._record

    def wait(*args, **options):
        barrier.wait(5)  # both have written their arguments, neither was read
        record(*args, **options)

    driver._record = wait
    threads = [threading.Thread(target=run, args=((1,), 0, n, n, n, 0.0)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(one.arguments[0] for one in driver.launches) == [1, 2]
