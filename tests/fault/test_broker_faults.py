"""A broker whose peers are broken, hostile, stopped or forked, and whose directory is full."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time

import pytest
from broker_tenant import MIB, CountingTenant
from fault.broker_engine import CAPACITY
from fault.broker_rig import Rig, until

from kvcached.broker import protocol as p
from kvcached.broker.client import BrokerBudget, list_tenants
from kvcached.broker.probe import shmem_bytes
from kvcached.broker.protocol import Message, Op
from kvcached.errors import BrokerUnavailable, BudgetExceeded, ForkedProcessError

pytestmark = [pytest.mark.timeout(120)]


@pytest.fixture
def rig(runtime_dir):
    rig = Rig(runtime_dir / "r")
    yield rig
    rig.close()


@pytest.fixture
def tenant(runtime_dir):
    one = CountingTenant("a")
    yield one
    one.close()


def broker_fds():
    (device,) = list_tenants("cpu")
    return len(os.listdir(f"/proc/{device.broker_pid}/fd"))


def connect(runtime_dir):
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        peer.connect(f"{runtime_dir}/cpu.sock")
        peer.settimeout(5)
    except OSError:
        peer.close()
        raise
    return peer


# --- hostile peers ------------------------------------------------------------------------------


def malformed(rng):
    good = p.encode(Message(Op.CLAIM, 1, values=(1, 1)))
    op = rng.choice([Op.GIVE_BACK, Op.BYE, Op.GRANT, Op.ANSWER, Op.WELCOME])
    form = p._FIXED.get(op)
    values = (7,) * (form.size // 8 if form else 0)
    return rng.choice([
        rng.randbytes(rng.randint(1, 5000)),
        good[: rng.randint(1, len(good) - 1)],
        good + b"x" * rng.randint(1, 9),
        good * rng.randint(2, 200),
        p.HEADER.pack(p.MAGIC, 1, Op.HELLO, (1 << 32) - 1, 0, 1, 0),
        p.encode(Message(rng.choice([Op.HELLO, Op.REPORT]), 1, body={"name": [], "x": -1})),
        p.encode(Message(op, 1, values=values)),
    ])  # fmt: skip


def test_ten_thousand_malformed_messages(tenant, runtime_dir):
    rng = random.Random(1)
    tenant.use(MIB)
    before, sent, cut = broker_fds(), 0, 0
    while sent < 10_000:
        with connect(runtime_dir) as peer:
            for _ in range(4):
                try:
                    fds = [0, 1, 2] if rng.random() < 0.1 else []
                    socket.send_fds(peer, [malformed(rng)], fds)
                    sent += 1
                    if not peer.recv(5000):
                        cut += 1
                        break
                except OSError:
                    cut += 1
                    break
    assert cut > 2000  # three errors and out
    assert until(lambda: broker_fds() == before)
    assert tenant.budget.claimed_bytes == MIB
    tenant.use(MIB)


def test_too_many_descriptors_are_closed(tenant, runtime_dir):
    before = broker_fds()
    for _ in range(20):
        with connect(runtime_dir) as peer, contextlib.suppress(OSError):
            socket.send_fds(peer, [p.encode(Message(Op.PING, 1))], [0] * 253)
            peer.recv(5000)
    assert until(lambda: broker_fds() == before)


def test_a_flood_of_connections_and_a_peer_that_does_not_read(tenant, runtime_dir):
    before, peers = broker_fds(), []
    for _ in range(1000):
        with contextlib.suppress(OSError):
            peers.append(connect(runtime_dir))
    deaf = connect(runtime_dir)
    deaf.setblocking(False)
    ping = p.encode(Message(Op.LIST, 1))
    with contextlib.suppress(OSError):
        for _ in range(20_000):
            deaf.send(ping)
    started = time.monotonic()
    tenant.use(200 * MIB)
    assert time.monotonic() - started < 2.0
    for peer in [*peers, deaf]:
        peer.close()
    assert until(lambda: broker_fds() == before)


def test_a_stranger_cannot_speak_for_a_tenant(tenant, runtime_dir):
    tenant.use(8 * MIB)
    with connect(runtime_dir) as peer:
        for op, values in ((Op.GIVE_BACK, (1,)), (Op.CLAIM, (1, 1)), (Op.BYE, ())):
            peer.send(p.encode(Message(op, 9, values=values)))
            assert p.decode(peer.recv(5000)).status == p.BAD_MESSAGE
        assert peer.recv(5000) == b""
    (device,) = list_tenants("cpu")
    assert device.leased_bytes >= 8 * MIB


# --- stopped, killed, forked --------------------------------------------------------------------


def test_a_stopped_engine_delays_nobody_but_who_needs_its_memory(rig):
    rig.start(0, f"hold:{CAPACITY // 2}")
    rig.expect(0, "held")
    rig.start(1)
    engine = rig.engines[0]
    engine.send_signal(signal.SIGSTOP)
    other = CountingTenant("other", config=rig.config)
    try:
        assert rig.device() is not None  # the broker answers
        started = time.monotonic()
        with pytest.raises(BudgetExceeded):
            other.use(CAPACITY)
        assert time.monotonic() - started < 5.0
    finally:
        engine.send_signal(signal.SIGCONT)
        other.close()


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
    assert "Traceback" not in rig.end(0)
    assert until(lambda: not rig.leftovers()), rig.leftovers()


FORKER = """
import os, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from broker_engine import *
from kvcached.broker import link
from kvcached.memory import forks
engine = Engine(sys.argv[3], "forker", capacity=256 << 20)
engine.grow((128 << 20) // PAGE)
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


@pytest.mark.parametrize("kind", ["hooks", "plain", "memory"])
def test_fork_without_exec(rig, kind):
    """With our hooks the child holds nothing; without them nothing is credited before it ends."""
    import sys

    from fault.broker_rig import PACKAGE, SCRIPT

    other = CountingTenant("other", config=rig.config, capacity=256 * MIB)
    before = shmem_bytes()
    process = subprocess.Popen(
        [sys.executable, "-c", FORKER, PACKAGE, os.path.dirname(SCRIPT), rig.runtime_dir, kind],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    child = 0
    try:
        child = int(process.stdout.readline())
        assert shmem_bytes() - before > 64 * MIB
        process.kill()
        process.wait()
        if kind == "hooks":
            assert until(lambda: rig.device().leased_bytes == 0, 2.0)
        else:
            time.sleep(0.5)
            (dead,) = [t for t in rig.device().tenants if t.name == "forker"]
            assert dead.state == ("revoked" if kind == "plain" else "draining")
            assert rig.device().leased_bytes >= 128 * MIB
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()
    assert until(lambda: rig.device().leased_bytes == 0, 4.0)
    other.use(250 * MIB)
    other.close()


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
    import sys

    script = (
        "from kvcached.broker.client import BrokerBudget\n"
        "b = BrokerBudget('a', device='cpu', limit_bytes=None, capacity_bytes=1 << 30)\n"
        "b.claim(1 << 20)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
    assert until(lambda: not set(os.listdir(runtime_dir)) - {"cpu.log"})


# --- the runtime directory ----------------------------------------------------------------------


def mount(path, options):
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("cannot mount a file system here")


def test_a_full_runtime_directory(runtime_dir):
    small = runtime_dir / "small"
    small.mkdir()
    mount(small, "size=16k,mode=0700")
    try:
        with contextlib.suppress(OSError), open(small / "fill", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        from kvcached.config import Config

        config = Config(runtime_dir=str(small))
        with contextlib.ExitStack() as stack:
            one = CountingTenant("a", config=config)
            stack.callback(one.close)
            one.use(MIB)
            (device,) = list_tenants("cpu", config=config)
            os.kill(device.broker_pid, signal.SIGKILL)
            one.use(100 * MIB)  # the roster is unknown, so after the grace time
        (small / "fill").unlink()
        two = CountingTenant("b", config=config)
        two.use(MIB)
        two.close()
        assert until(lambda: not set(os.listdir(small)) - {"cpu.log"})
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_runtime_directory_without_a_free_inode(runtime_dir):
    small = runtime_dir / "small"
    small.mkdir()
    mount(small, "nr_inodes=1,mode=0700")
    from kvcached.config import Config

    try:
        with pytest.raises(BrokerUnavailable, match="No space left") as caught:
            BrokerBudget("a", device="cpu", limit_bytes=1, config=Config(runtime_dir=str(small)))
        assert "space" in caught.value.hint
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_runtime_directory_of_somebody_else(runtime_dir):
    from kvcached.config import Config
    from kvcached.errors import UnsafeRuntimeDir

    foreign = runtime_dir / "foreign"
    foreign.mkdir(mode=0o700)
    os.chown(foreign, 65534, 65534)
    with pytest.raises(UnsafeRuntimeDir, match="belongs to user 65534"):
        BrokerBudget("a", device="cpu", limit_bytes=1, config=Config(runtime_dir=str(foreign)))
