"""The broker's process: one loop over a Unix socket. Started by the first engine of a device.

It counts memory and never owns it, so its death costs nobody anything: engines keep what they
hold, elect the next broker, and say what they hold (docs/broker.md, rules 5 and 6).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import time
from typing import Any

from kvcached.broker.files import RuntimeDir
from kvcached.broker.ledger import Ledger
from kvcached.broker.members import Members
from kvcached.broker.mirror import MirrorWriter
from kvcached.broker.peer import MAX_ERRORS, Peer
from kvcached.broker.probe import MemoryProbe, make_probe
from kvcached.broker.protocol import BAD_MESSAGE, MAX_BYTES, Message, Op
from kvcached.broker.service import Service
from kvcached.errors import ProtocolError

LINGER_S = 0.5
"""How long the broker stays after its last tenant has gone."""
FIRST_TENANT_S, EXPECTED_TENANT_S = 3.0, 600.0
"""How long a new broker waits for its first tenant, and at most while somebody is connected."""
MAX_PEERS_PER_UID = 256
_MESSAGES_PER_TURN = 16
_MAX_LOG = 256 << 10
_TOO_FAST_S = 0.005


class Log:
    """A text file of bounded size: at the bound it becomes ``.1``. A full disk loses lines."""

    def __init__(self, directory: RuntimeDir) -> None:
        self._directory = directory

    def __call__(self, line: str) -> None:
        """Append a line with the time."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        name, directory = self._directory.log, self._directory
        with contextlib.suppress(OSError):  # the log is the least of a full disk's victims
            fd = directory.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                if os.fstat(fd).st_size > _MAX_LOG:
                    os.rename(name, f"{name}.1", src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
                os.write(fd, f"{stamp} {os.getpid()} {line}\n".encode())
            finally:
                os.close(fd)


class Server:
    """Sockets, processes and time; all decisions are ``Service``'s.

    Parameters
    ----------
    directory:
        The runtime directory; the caller holds the lock in it.
    device:
        Slug of the device: ``cpu`` or ``gpu-<uuid>``.
    capacity:
        Bytes for all tenants together; a roster that a killed broker left wins.
    probe:
        Asks the device about its memory; ``None``: the one for ``device``.
    """

    def __init__(
        self, directory: RuntimeDir, device: str, capacity: int, probe: MemoryProbe | None = None
    ) -> None:
        self._directory = directory
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, Peer] = {}
        self._paused: dict[Peer, float] = {}
        self._dirty: set[Peer] = set()
        now = time.monotonic()
        roster = _read_roster(directory)
        expected = None if roster is None else roster.get("instances", ())
        if roster:
            capacity = roster["capacity"]
        epoch = max(time.time_ns(), (roster or {}).get("epoch", 0) + 1)
        log = Log(directory)
        if probe is None:
            foreign = (roster or {}).get("foreign")
            probe = make_probe(device, capacity=capacity, foreign=foreign, log=log)
        self._ledger = Ledger(capacity, now, expected)
        self._members = Members(
            self._ledger, probe, self, directory, log,
            lasting={"epoch": epoch, "capacity": capacity},
        )  # fmt: skip
        self._mirror = MirrorWriter()
        self._service = Service(
            self._ledger, self._members, self._mirror, epoch=epoch, device=device, log=log
        )
        self._members.write_roster()  # also: no space for it, no broker
        self._empty_since: float | None = now
        self._listener = self._listen()

    def run(self) -> None:
        """Serve until the last tenant has gone."""
        while not self._is_over(time.monotonic()):
            self._turn()
        self._leave()

    # --- Watcher ----------------------------------------------------------------------------------

    def watch_exit(self, pidfd: int, ident: int) -> None:
        """See ``Watcher``."""
        self._selector.register(pidfd, selectors.EVENT_READ, ident)

    def unwatch_exit(self, pidfd: int) -> None:
        """See ``Watcher``. Harmless if it is not watched."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(pidfd)

    # --- the loop ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        now = time.monotonic()
        for key, events in self._selector.select(self._wait_s(now)):
            now = time.monotonic()
            if key.data is None:
                self._accept(now)
            elif isinstance(key.data, Peer):
                self._serve(key.data, events, now)
            elif key.data in self._members.by_ident:
                self._members.exited(key.data, now)
        now = time.monotonic()
        self._resume(now)
        self._service.settle(now)
        self._tend()

    def _wait_s(self, now: float) -> float:
        times = list(self._paused.values())
        due = self._service.next_deadline(now)
        times += [due] if due is not None else []
        if self._empty_since is not None:
            times.append(self._empty_since + self._patience)
        return max(0.0, min(times, default=now + 60.0) - now)

    def _accept(self, now: float) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again, or we are out of descriptors: the others come first
            self._cut_a_stranger(None)
            return
        peer = Peer(connection, now, self._dirty)
        if sum(other.uid == peer.uid for other in self._peers.values()) >= MAX_PEERS_PER_UID:
            self._cut_a_stranger(peer.uid)
        if sum(other.uid == peer.uid for other in self._peers.values()) >= MAX_PEERS_PER_UID:
            peer.close()
            return
        self._peers[peer.fileno()] = peer
        self._selector.register(peer, selectors.EVENT_READ, peer)

    def _cut_a_stranger(self, uid: int | None) -> None:
        """Make room: the oldest connection without a tenant goes."""
        strangers = [p for p in self._peers.values() if not p.ident and uid in {None, p.uid}]
        if strangers:
            self._drop(min(strangers, key=lambda p: p.since), time.monotonic())

    def _serve(self, peer: Peer, events: int, now: float) -> None:
        if self._peers.get(peer.fileno()) is not peer:
            return  # dropped earlier in this turn
        if events & selectors.EVENT_WRITE:
            peer.flush()
        if not events & selectors.EVENT_READ:
            return
        for _ in range(_MESSAGES_PER_TURN):
            if not peer.take_token(now):
                self._paused[peer] = now + _TOO_FAST_S
                self._dirty.add(peer)
                return
            try:
                message, fds = peer.receive()
            except BlockingIOError:
                return
            try:
                if message is None:
                    self._drop(peer, now)
                    return
                self._handle(peer, message, fds, now)
            finally:
                for fd in fds:
                    os.close(fd)
            if peer.broken:
                return

    def _handle(
        self, peer: Peer, message: Message | ProtocolError, fds: list[int], now: float
    ) -> None:
        try:
            if isinstance(message, ProtocolError):
                raise message
            self._service.handle(peer, message, fds, now)
        except ProtocolError as error:
            peer.errors += 1
            request = message.request if isinstance(message, Message) else 0
            body = {"error": error.message[:500]}
            peer.send(Message(Op.ERROR, request, 0, BAD_MESSAGE, (), body))
            if peer.errors >= MAX_ERRORS:
                peer.cut()

    def _resume(self, now: float) -> None:
        for peer in [peer for peer, until in self._paused.items() if now >= until]:
            del self._paused[peer]
            self._dirty.add(peer)

    def _tend(self) -> None:
        """Cut broken peers; watch each of the others for what it is waiting for."""
        now = time.monotonic()
        for peer in list(self._dirty):
            if peer.broken:
                self._drop(peer, now)
                continue
            if not peer.wants_to_write and peer not in self._paused:
                self._dirty.discard(peer)
            events = 0 if peer in self._paused else selectors.EVENT_READ
            events |= selectors.EVENT_WRITE if peer.wants_to_write else 0
            self._watch(peer, events)

    def _watch(self, peer: Peer, events: int) -> None:
        known = self._selector.get_map().get(peer)
        if known is None and events:
            self._selector.register(peer, events, peer)
        elif known is not None and not events:
            self._selector.unregister(peer)
        elif known is not None and known.events != events:
            self._selector.modify(peer, events, peer)

    def _drop(self, peer: Peer, now: float) -> None:
        self._dirty.discard(peer)
        if self._peers.pop(peer.fileno(), None) is None:
            return
        with contextlib.suppress(KeyError):
            self._selector.unregister(peer)
        self._paused.pop(peer, None)
        self._service.lost(peer, now)
        peer.close()

    # --- coming and going -------------------------------------------------------------------------

    def _listen(self) -> socket.socket:
        """Bind to a temporary name, close it to others, then put it in place in one step."""
        directory = self._directory
        temporary = directory.socket.replace(".sock", ".new")  # a killed broker's is replaced
        directory.remove(temporary)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        old = os.umask(0o177)
        try:
            listener.bind(f"{directory.path}/{temporary}")
        finally:
            os.umask(old)
        os.chmod(temporary, 0o600, dir_fd=directory.fd)
        listener.setblocking(False)
        listener.listen(512)
        os.rename(temporary, directory.socket, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
        self._selector.register(listener, selectors.EVENT_READ, None)
        return listener

    def _is_over(self, now: float) -> bool:
        if self._members.by_ident:
            self._empty_since = None
            return False
        if self._empty_since is None:
            self._empty_since = now
        return now - self._empty_since >= self._patience

    @property
    def _patience(self) -> float:
        if self._members.had_one:
            return LINGER_S
        return EXPECTED_TENANT_S if self._peers else FIRST_TENANT_S

    def _leave(self) -> None:
        """Nobody is here. Whoever is just coming finds no answer and elects the next broker."""
        directory = self._directory
        directory.remove(directory.socket)
        self._listener.close()
        for peer in list(self._peers.values()):
            peer.close()
        self._selector.close()
        self._mirror.close()
        directory.remove(directory.roster)
        directory.remove(directory.lock)  # last: from here on another broker may start


def _read_roster(directory: RuntimeDir) -> dict[str, Any] | None:
    """What the last broker left: ``{}`` if it left in order, ``None`` if it cannot be known."""
    data = directory.read(directory.roster, 1 << 20)
    if data is None:
        return {}
    try:
        roster = json.loads(data)
        sizes = [roster["capacity"], roster["epoch"]]
        instances = roster["instances"]
    except (ValueError, KeyError, TypeError):
        return None
    sound = all(isinstance(size, int) and 0 <= size <= MAX_BYTES for size in sizes)
    sound = sound and isinstance(instances, list)
    sound = sound and isinstance(roster.get("foreign"), int | None)
    return roster if sound and all(isinstance(i, str) for i in instances) else None


def main(arguments: list[str]) -> int:
    """Run a broker: runtime directory, device slug, capacity, ready fd, lock fd (it is locked).

    Writes ``ok`` or what went wrong to the ready fd.
    """
    path, device, capacity, ready, _lock = arguments
    try:
        server = Server(RuntimeDir(path, device), device, int(capacity))
    except OSError as error:
        os.write(int(ready), f"{error}".encode()[:2000])
        return 1
    os.write(int(ready), b"ok")
    os.close(int(ready))
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
