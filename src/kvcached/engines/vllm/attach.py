"""From vLLM's scheduler to the memory of its workers, which becomes a tenant of a budget."""

from __future__ import annotations

import logging
import os
import re
from fractions import Fraction
from typing import Any

from kvcached.broker.budget import Budget
from kvcached.broker.ranks import RankBudget
from kvcached.config import Config, engine_config, format_size, read_for_theirs
from kvcached.engines.vllm import region as regions
from kvcached.engines.vllm.port import served_port
from kvcached.engines.vllm.stages import Stages, stages_of
from kvcached.engines.vllm.tenant import EngineBlocks
from kvcached.errors import BackendUnavailable, EngineUnsupported, NotAllowed
from kvcached.memory.base import Fence, MemoryBackend
from kvcached.memory.fences import PassedFence, fence_on
from kvcached.memory.remote import RemoteBackend, Worker
from kvcached.resources import make_budget

_log = logging.getLogger("vllm.kvcached")


_MOST_NAME = 56
_attached = False  # to workers in other processes: they serve one page pool


def attach(num_blocks: int) -> EngineBlocks | None:
    """The elastic blocks of the engine of this process, if its cache of this size is elastic."""
    global _attached
    here = regions.current(num_blocks)
    if here is not None:
        backend = here.take_over()
        said = [here.describe()]
        return _make(backend, stages_of(said), said,
                     lambda: fence_on(here.backend, here.stream), here=True)  # fmt: skip
    found = None if _attached else _workers()
    if found is None:
        return None
    _attached = True
    try:
        said = [worker.hello() for worker in found]
        if said[0]["num_blocks"] != num_blocks:
            raise EngineUnsupported(
                f"the scheduler has {num_blocks} KV blocks and its workers {said[0]['num_blocks']}",
                hint="Unset KVCACHED, and please report this.",
            )
        stages = stages_of(said)
        remote = RemoteBackend(found, stages.shares)
    except BaseException:  # whatever it was, no connection stays behind
        _end(found)
        raise

    def settled() -> Fence:
        remote.settle()
        return PassedFence()

    return _make(remote, stages, said, settled)


def _workers() -> list[Worker] | None:
    """Connections to the workers of this process; ``None`` if it has no elastic ones."""
    owner, found = os.getpid(), list[Worker]()
    try:
        found.append(Worker(owner, 0, patience=0))
    except (BackendUnavailable, NotAllowed):  # nobody, or another user's: ours could not listen
        return None
    try:
        facts = regions.facts_in(found[0].hello())
        found += [Worker(owner, rank) for rank in range(1, facts.world_size)]
    except BaseException:  # whatever it was, no connection stays behind
        _end(found)
        raise
    return found


def _end(workers: list[Worker]) -> None:
    for worker in workers:
        worker.close()


def _make(
    backend: MemoryBackend, stages: Stages, said: list[dict[str, Any]], tail: Any, *,
    here: bool = False,
) -> EngineBlocks:  # fmt: skip
    geometry, facts = stages.geometry, regions.facts_in(said[stages.leader])
    config = engine_config()
    name = config.name or f"{slug(facts.model)}-{os.getpid()}"
    if config.name and facts.replica:  # the name is the same for all, and each is a tenant
        name = f"{name[:_MOST_NAME]}-dp{facts.replica}"
    budget = _budget(name, config, stages, said)
    tenant = EngineBlocks(
        geometry, backend=backend, budget=budget, name=name, config=config, owns_backend=False,
        make_tail=tail if facts.runs_on else None, make_idle_tail=tail if here else None,
        handles=max(share.planes for share in stages.shares),
    )  # fmt: skip
    block, all_of = geometry.block_bytes * geometry.num_planes, stages.factor(range(len(said)))
    _log.info(
        "%s: elastic KV cache: up to %s (%d blocks of %s), %s of addresses; shared as %s",
        facts.engine, format_size(int(budget.limit_bytes * all_of)), budget.limit_bytes // block,
        format_size(int(block * all_of)), format_size(int(geometry.reserved_bytes * all_of)), name,
    )  # fmt: skip
    for old, ours in read_for_theirs().items():
        _log.info("%s: %s is read as %s, which wins if it is set", name, old, ours)
    if budget.limit_bytes < facts.request_bytes:
        _log.warning("%s: a request of full length takes %s, more than the limit: such a request "
                     "waits until the limit is raised, or --max-model-len is to be lowered",
                     name, format_size(int(facts.request_bytes * all_of)))  # fmt: skip
    return tenant


class _Device:
    """What ``make_budget`` asks of a backend, from a worker's description of its own."""

    def __init__(self, said: dict[str, Any]) -> None:
        self.device, self.uuid = said["device"], said["uuid"]
        self.total_bytes = int(said["total_bytes"])


def _budget(name: str, config: Config, stages: Stages, said: list[dict[str, Any]]) -> Budget:
    """The budgets of the workers' devices, as one."""
    facts = [regions.facts_in(body) for body in said]
    devices: dict[str, list[int]] = {}
    for rank, body in enumerate(said):
        devices.setdefault(body["uuid"] or body["device"], []).append(rank)
    shares: list[tuple[Budget, Fraction]] = []
    meta: dict[str, Any] = {"engine": facts[0].engine, "model": facts[0].model}
    meta |= {"port": port} if (port := served_port()) else {}
    try:
        for ranks in devices.values():
            allowed = sum(facts[rank].limit_bytes for rank in ranks)
            limit: int | str | None = config.limit or allowed or None
            shares.append((make_budget(
                name, _Device(said[ranks[0]]), config, limit=limit,  # type: ignore[arg-type]
                floor=config.floor, weight=config.weight, meta=meta,
            ), stages.factor(ranks)))  # fmt: skip
    except BaseException:  # whatever it was, the other devices' budgets do not stay behind
        for budget, _ in shares:
            budget.close()
        raise
    return shares[0][0] if len(said) == 1 else RankBudget(shares)


def slug(model: str) -> str:
    """A model's name or path, as the name of a tenant: lower case, its last part, 40 letters."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._")[:40].strip("-._") or "vllm"
