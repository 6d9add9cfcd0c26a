"""Workers in this process: what ``RemoteBackend`` asks is answered at once, without sockets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvcached.broker.budget import LocalBudget
from kvcached.broker.ranks import RankBudget
from kvcached.engines.vllm.region import Facts, Region
from kvcached.engines.vllm.stages import stages_of
from kvcached.errors import BackendUnavailable, KvcachedError
from kvcached.layout import Geometry
from kvcached.memory.remote import RemoteBackend
from kvcached.memory.serving import BackendServer
from kvcached.memory.wire import Frame, Op
from kvcached.testing import FailingBackend, FakeBackend

PAGE = 8


class NearServer(BackendServer):
    """Without a socket and a thread."""

    def __init__(self, region):
        self._backend, self._describe = region.take_over(), region.describe
        self._wait = lambda: None
        self._handles, self._ranges = {}, {}

    def close(self):
        pass


class NearWorker:
    """As ``Worker``. ``dead``: its process has ended."""

    def __init__(self, region):
        self.region, self.server, self.dead = region, NearServer(region), False
        self.answers: list[Frame | Exception] = []
        self.name = f"worker {region.facts.rank}"

    def send(self, op, values=()):
        if self.dead:
            raise BackendUnavailable(f"{self.name} does not answer")
        try:
            self.answers.append(self.server._answer(Frame(op, 0, values=values)))
        except KvcachedError as error:
            self.answers.append(error)

    def receive(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, op, values=()):
        self.send(op, values)
        return self.receive()

    def hello(self):
        return self.call(Op.HELLO).body

    def close(self):
        pass


@dataclass(frozen=True)
class Shape:
    """Of one worker: bytes of a block in each of its planes, and its device."""

    block: int
    planes: int = 1
    device: int = 0
    extra: int = 0
    """Pages of addresses beyond its blocks."""


@dataclass
class Ranks:
    """Workers of these shapes with ``blocks`` blocks each, and what the scheduler makes of them."""

    shapes: list[Shape]
    blocks: int
    workers: list[NearWorker] = field(default_factory=list)
    wrap: Any = lambda backend: backend

    def __post_init__(self):
        size = len(self.shapes)
        for rank, shape in enumerate(self.shapes):
            geometry = Geometry(shape.block, shape.planes, self.blocks, PAGE)
            facts = Facts(rank, size, "m", "vLLM", 0, 0, runs_on=False)
            region = Region(self.wrap(FakeBackend(PAGE)), geometry, facts, more_pages=shape.extra)
            self.workers.append(NearWorker(region))
        self.said = [worker.hello() for worker in self.workers]
        self.stages = stages_of(self.said)
        self.backend = RemoteBackend(self.workers, self.stages.shares)

    @property
    def regions(self):
        return [worker.region for worker in self.workers]

    def budget(self, nbytes, make=LocalBudget):
        """For each device; ``nbytes`` are those of the worker that holds most."""
        self.parts, shares = [], []
        for device in sorted({shape.device for shape in self.shapes}):
            ranks = [i for i, shape in enumerate(self.shapes) if shape.device == device]
            factor = self.stages.factor(ranks)
            self.parts.append(make(-(-nbytes * factor.numerator // factor.denominator)))
            shares.append((self.parts[-1], factor))
        return RankBudget(shares)

    def places(self, block):
        """Backend, address and size of each piece of a block, in all planes of all workers."""
        for region in self.regions:
            g = region.geometry
            for plane in range(g.num_planes):
                start = region.reservation.address + plane * g.plane_bytes
                yield region.backend, start + block * g.block_bytes, g.block_bytes

    def write(self, block, data):
        for number, (backend, address, size) in enumerate(self.places(block)):
            backend.write(address, data(number, size))

    def read(self, block):
        """What lies in a block; raises where a page of it is not mapped."""
        return [backend.read(address, size) for backend, address, size in self.places(block)]

    def held(self):
        """Bytes that each device really has behind."""
        return [sum(region.backend.resident_bytes()
                    for region, shape in zip(self.regions, self.shapes, strict=True)
                    if shape.device == device)
                for device in sorted({shape.device for shape in self.shapes})]  # fmt: skip

    def check(self):
        self.backend.check()
        for region in self.regions:
            region.backend.check()

    def close(self):
        self.backend.shutdown()
        for region in self.regions:
            region.close()


def failing(backend):
    """For ``Ranks.wrap``: fails where the test says."""
    return FailingBackend(backend, fail_at=1 << 60)
