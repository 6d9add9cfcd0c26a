"""Two ``vllm serve`` in one budget that cannot hold both: every request ends, with its tokens."""

from __future__ import annotations

import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from real_vllm import rig

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
BUDGET = 20 << 20  # 40 blocks; one engine at full load wants 16 requests of 6 blocks


def prompt(number):
    return f"request {number}: " + "pages come and go " * (20 + number % 20)


@pytest.fixture(scope="module")
def servers(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    run, made = Path(tempfile.mkdtemp(prefix="kv-")), []
    try:
        more = {"KVCACHED": "strict", "KVCACHED_BUDGET": str(BUDGET),
                "VLLM_SERVER_DEV_MODE": "1"}  # fmt: skip
        made.append(rig.Server(model, run, folder / "a.log", KVCACHED_NAME="a",
                               VLLM_CPU_OMP_THREADS_BIND="0", **more))  # fmt: skip
        made.append(rig.Server(model, run, folder / "b.log", KVCACHED_NAME="b",
                               VLLM_CPU_OMP_THREADS_BIND="1", **more))  # fmt: skip
        for server in made:
            server.wait()
        yield run, *made
    finally:
        for server in made:
            server.end()
        shutil.rmtree(run, ignore_errors=True)


def load(server, numbers, max_tokens=150):
    """Texts of many requests at once."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda n: server.complete(prompt(n), max_tokens), numbers))


def keep_asking(server, number):
    """One request after the other, until there is no answer: then one is always on its way."""
    while True:
        server.complete(prompt(number), 400)


def leases(run):
    return {t["name"]: t["lease_bytes"] for t in rig.tenants(run)}


def backed(run, name):
    (found,) = (t["report"]["backed_bytes"] for t in rig.tenants(run) if t["name"] == name)
    return found


def test_they_are_listed(servers):
    run, _, _ = servers
    found = {t["name"]: t for t in rig.tenants(run)}
    assert set(found) == {"a", "b"}
    assert found["a"]["meta"]["model"] == "tiny"


def test_both_at_once_end_with_the_tokens_of_one_alone(servers):
    run, a, b = servers
    alone = load(a, range(24))
    assert leases(run)["a"] > BUDGET // 2  # its prefixes fill what nobody else wants
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda s: load(s, range(24)), (a, b)))
    assert both[0] == alone
    assert both[1] == alone
    assert sum(leases(run).values()) <= BUDGET


def test_an_idle_neighbours_prefixes_make_room(servers):
    run, a, b = servers
    load(a, range(100, 124))
    assert leases(run)["a"] > BUDGET // 2
    load(b, range(200, 224))
    assert leases(run)["b"] > leases(run)["a"]


def test_sleep_takes_all_memory_from_running_requests_and_waking_gives_it_back(servers):
    run, a, _ = servers
    alone = load(a, range(500, 506))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(load, a, range(500, 506))
        time.sleep(0.5)
        a.post("/sleep?level=1&mode=keep", {})
        assert backed(run, "a") == rig.BLOCK  # the null block
        assert not running.done()
        a.post("/wake_up", {})
        assert running.result() == alone


def test_a_reset_and_a_pause_give_the_prefixes_memory_back(servers):
    run, a, _ = servers
    for path in ("/reset_prefix_cache", "/pause?mode=wait"):
        load(a, range(600, 604), max_tokens=8)
        assert backed(run, "a") > rig.BLOCK
        a.post(path, {})
        assert backed(run, "a") == rig.BLOCK
    a.post("/resume", {})


def test_the_metrics_count_what_is_in_use_and_show_who_shares_the_budget(servers):
    _, a, _ = servers
    text = a.metrics()
    usage = next(line for line in text.splitlines() if line.startswith("vllm:kv_cache_usage_perc"))
    assert float(usage.split()[-1]) < 0.1  # idle, though the address space is mostly unbacked
    ours = [line for line in text.splitlines() if line.startswith("kvcached_lease_bytes{")]
    assert {line.partition('name="')[2].partition('"')[0] for line in ours} == {"a", "b"}


def test_a_killed_engine_leaves_its_bytes_to_the_other(servers):
    run, a, b = servers
    alone = load(a, range(300, 316))
    with ThreadPoolExecutor(5) as pool:
        doomed = [pool.submit(keep_asking, b, n) for n in range(4)]
        time.sleep(1)
        others = pool.submit(load, a, range(300, 316))
        b.kill()
        assert others.result() == alone
        for future in doomed:
            with pytest.raises(OSError):  # noqa: PT011 - the connection broke, however it says so
                future.result()
    end = time.monotonic() + 5
    while len(found := leases(run)) > 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert set(found) == {"a"}
    load(a, range(400, 432))
    assert leases(run)["a"] > BUDGET // 2
