"""A broker whose peers are stopped, killed or forked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from broker_tenant import MIB, CountingTenant
from fault.broker_engine import CAPACITY
from fault.broker_rig import PACKAGE, SCRIPT, Rig, ping_seconds, state_of, until

from kvcached.broker.probe import shmem_bytes
from kvcached.errors import BudgetExceeded, ForkedProcessError

pytestmark = [pytest.mark.timeout(120)]


@pytest.fixture
def rig(runtime_dir):
    rig = Rig(runtime_dir / "r")
    yield rig
    rig.close()


def test_a_stopped_engine_delays_nobody_but_who_needs_its_memory(rig):
    rig.start(0, f"hold:{CAPACITY // 2}")
    rig.expect(0, "held")
    rig.start(1)
    engine, refused = rig.engines[0], []
    quiet = ping_seconds(rig.runtime_dir)
    engine.send_signal(signal.SIGSTOP)
    other = CountingTenant("other", config=rig.config)

    def claim():
        with pytest.raises(BudgetExceeded):
            other.use(CAPACITY)
        refused.append(time.monotonic())

    waiting = threading.Thread(target=claim)
    try:
        waiting.start()
        assert until(lambda: [t.name for t in rig.device().tenants if t.state == "late"] == ["e0"])
        assert ping_seconds(rig.runtime_dir) < 20 * quiet
    finally:
        waiting.join(30)
        engine.send_signal(signal.SIGCONT)
        other.close()
    assert refused, "the claim was not answered while the engine was stopped"
    assert until(lambda: rig.device().leased_bytes >= CAPACITY // 2)


def test_engine_and_broker_killed_at_once(rig):
    rig.start(0)
    for _ in range(10):
        rig.start(1)
        broker = rig.broker_pid()
        time.sleep(0.05)
        os.kill(broker, signal.SIGKILL)
        rig.kill(1)
        gone = until(lambda: (d := rig.device()) and [t.name for t in d.tenants] == ["e0"])
        assert gone
    assert "Traceback" not in rig.end(0)[1]
    assert until(lambda: not rig.leftovers()), rig.leftovers()


FORKER = """
import os, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from broker_engine import *
from kvcached.broker import link
from kvcached.memory import forks
engine = Engine(sys.argv[3], "forker", capacity=256 << 20)
engine.grow(int(sys.argv[5]) // PAGE)
if sys.argv[4] == "plain":     # a child that knows nothing of us: C code that calls fork()
    forks._LIVE.clear(); link._open_fds.clear()
if sys.argv[4] == "memory":    # it lets go of the socket, and keeps the memory
    forks._LIVE.clear()
pid = os.fork()
if pid == 0:
    os.close(1); time.sleep(600); os._exit(0)
sys.stdout.write(f"{pid}\\n"); sys.stdout.flush()
time.sleep(600)
"""
HELD = 96 * MIB
"""More than the tolerance of the broker's look at Shmem, several times."""


@contextlib.contextmanager
def forker(rig, kind):
    """A process that holds memory, and its child, which it has forked without exec."""
    arguments = [PACKAGE, os.path.dirname(SCRIPT), rig.runtime_dir, kind, str(HELD)]
    parent = subprocess.Popen(
        [sys.executable, "-c", FORKER, *arguments], stdout=subprocess.PIPE, text=True
    )
    pidfd = -1  # a dead child is init's to reap, so its number could be somebody else's
    try:
        child = int(parent.stdout.readline())
        pidfd = os.pidfd_open(child)
        yield parent, child, partial(signal.pidfd_send_signal, pidfd, signal.SIGKILL)
    finally:
        if pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        parent.kill()
        parent.wait()
        parent.stdout.close()


def held_by(pid):
    """What a process has open or mapped that belongs to an engine."""
    own = {"0", "1", "2"}
    fds = [entry for entry in os.scandir(f"/proc/{pid}/fd") if entry.name not in own]
    links = []
    for entry in fds:
        with contextlib.suppress(FileNotFoundError):  # just closed
            links.append(os.readlink(entry.path))
    with open(f"/proc/{pid}/maps") as maps:
        links += [line.split(maxsplit=5)[-1].strip() for line in maps]
    return {link for link in links if link.startswith(("socket:", "/memfd:kvcached ("))}


def all_is_back(rig):
    return rig.device().leased_bytes == 0


@pytest.fixture
def watcher(rig):
    """Keeps the broker alive, and shows at the end that all memory can be had again."""
    other = CountingTenant("other", config=rig.config, capacity=256 * MIB)
    try:
        yield other
        other.use(250 * MIB)
    finally:
        other.close()


@pytest.mark.parametrize("first", ["parent", "child"])
def test_a_forked_child_with_our_hooks_holds_nothing_of_its_parent(rig, watcher, first):
    for _ in range(10):
        before = shmem_bytes()
        with forker(rig, "hooks") as (parent, child, kill_child):
            assert shmem_bytes() - before > HELD // 2
            assert held_by(parent.pid)
            assert until(lambda pid=child: not held_by(pid))  # its hooks run beside its parent
            if first == "child":
                kill_child()
                assert until(lambda pid=child: state_of(pid) in "ZX")
                assert rig.device().leased_bytes >= HELD, "its end is not its parent's"
            parent.kill()
            parent.wait()
            assert until(lambda: all_is_back(rig))
            assert until(lambda before=before: shmem_bytes() - before < HELD // 2)
            if first == "parent":
                assert state_of(child) == "S", "it lives, and kept nothing"


@pytest.mark.parametrize(("kind", "state"), [("plain", "revoked"), ("memory", "draining")])
@pytest.mark.parametrize("first", ["parent", "child"])
def test_nothing_is_credited_while_a_forked_child_holds_it(rig, watcher, kind, state, first):
    with forker(rig, kind) as (parent, child, kill_child):
        assert any(link.startswith("/memfd") for link in held_by(child))
        kills = [parent.kill, kill_child] if first == "parent" else [kill_child, parent.kill]
        kills[0]()
        time.sleep(0.5)
        (found,) = [t for t in rig.device().tenants if t.name == "forker"]
        assert found.state == (state if first == "parent" else "live")
        assert found.lease_bytes >= HELD
        kills[1]()
        assert until(lambda: all_is_back(rig))


def test_a_budget_in_a_forked_child_raises_and_the_parent_goes_on(tenant):
    tenant.use(MIB)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            tenant.budget.claim(1)
        except ForkedProcessError as error:
            os.write(write, error.message.encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert b"belongs to the process that forked" in os.read(read, 4096)
    os.close(read)
    os.close(write)
    tenant.use(200 * MIB)


def test_an_engine_that_ends_without_close_does_not_hang(runtime_dir):
    script = (
        "from kvcached.broker.client import BrokerBudget\n"
        "b = BrokerBudget('a', device='cpu', limit_bytes=None, capacity_bytes=1 << 30)\n"
        "b.claim(1 << 20)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
    assert until(lambda: not set(os.listdir(runtime_dir)) - {"cpu.log"})
