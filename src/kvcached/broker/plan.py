"""Who gives back how much when a claim cannot be met: pure arithmetic over the ledger's view.

The order (docs/broker.md): what is spare or not even claimed, then cached prefixes by age across
all tenants, then what a split can save. In each step the tenants above their fair share give
first, down to that share, and then everybody, down to the floor. Nobody gives below the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcached.broker.lease import Tenant

MAX_RESERVE = 256 << 20


class Holding:
    """What one tenant could give: bytes of each kind, and how far it may be asked to go."""

    __slots__ = ("above_floor", "above_share", "cached", "oldest_s", "spare", "split", "tenant")

    def __init__(
        self, tenant: int, *, spare: int, cached: int, split: int, oldest_s: float,
        above_floor: int, above_share: int,
    ) -> None:  # fmt: skip
        self.tenant = tenant
        self.spare, self.cached, self.split = spare, cached, split
        self.oldest_s = oldest_s
        self.above_floor = max(0, above_floor)
        self.above_share = min(max(0, above_share), self.above_floor)

    def take(self, kind: str, nbytes: int) -> None:
        """Record that ``nbytes`` of ``kind`` are asked for."""
        setattr(self, kind, getattr(self, kind) - nbytes)
        self.above_floor -= nbytes
        self.above_share = max(0, self.above_share - nbytes)


def holding_of(tenant: Tenant, share: int, *, over: bool) -> Holding:
    """What ``tenant`` could give by its report; ``over``: to somebody above its own share."""
    report, rest = tenant.report, tenant.lease - tenant.asked
    kinds = [max(0, tenant.lease - report.backed), 0, 0]
    if report != tenant.spent:
        kinds[0] += report.spare
        kinds[1] = report.cached
    if report != tenant.spent and (report.idle or (report.pauses and not over)):
        kinds[2] = report.backed - report.spare - report.cached - report.split_floor
    asked = tenant.asked
    for index, kind in enumerate(kinds):  # what is asked for already comes off in that order
        kinds[index] = max(0, kind - asked)
        asked = max(0, asked - kind)
    return Holding(
        tenant.ident, spare=kinds[0], cached=kinds[1], split=kinds[2],
        oldest_s=report.oldest_cached_s,
        above_floor=rest - tenant.floor, above_share=rest - share,
    )  # fmt: skip


def fair_shares(capacity: int, tenants: Iterable[tuple[int, int, float, int]]) -> dict[int, int]:
    """Bytes that each tenant may count as its own: its floor, and its weight's part of the rest.

    ``tenants`` are (id, floor, weight, limit). A share above the limit is cut to the limit.
    """
    rows = list(tenants)
    rest = max(0, capacity - sum(row[1] for row in rows))
    weights = sum(row[2] for row in rows) or 1.0
    return {
        ident: min(limit, floor + int(rest * weight / weights))
        for ident, floor, weight, limit in rows
    }


def plan_reclaim(holdings: Sequence[Holding], shortfall: int) -> dict[int, int]:
    """Bytes to ask of each tenant so that ``shortfall`` comes back, or as much of it as can."""
    asks: dict[int, int] = {}
    for kind, split in (("spare", _in_turn), ("cached", _by_age), ("split", _in_turn)):
        for allowance in ("above_share", "above_floor"):
            can = [min(getattr(h, kind), getattr(h, allowance)) for h in holdings]
            parts = split(holdings, can, min(shortfall, sum(can)))
            for holding, part in zip(holdings, parts, strict=True):
                holding.take(kind, part)
                if part:
                    asks[holding.tenant] = asks.get(holding.tenant, 0) + part
            shortfall -= sum(parts)
    return asks


def ask_blindly(holdings: Sequence[Holding], missing: int) -> dict[int, int]:
    """Bytes to ask of tenants whose reports show nothing: those above their share first.

    ``plan_reclaim`` has taken off what it asks already.
    """
    asks: dict[int, int] = {}
    for allowance in ("above_share", "above_floor"):
        for holding in sorted(holdings, key=lambda h: -h.above_share):
            part = min(missing, getattr(holding, allowance))
            if part > 0:
                asks[holding.tenant] = asks.get(holding.tenant, 0) + part
                holding.above_floor -= part
                holding.above_share = max(0, holding.above_share - part)
                missing -= part
    return asks


def ask_for_more(
    holdings: Sequence[Holding], asks: dict[int, int], more: int, *, over: bool
) -> None:
    """Add to ``asks`` up to ``more`` bytes that those asked anyway do not use.

    Cached prefixes too, of those above their fair share, unless the claimer is ``over`` its own: it
    is about to take its share back, and to ask for each block of it is slow.
    """
    for other in holdings:
        cached = 0 if over else min(other.cached, other.above_share)
        part = min(more, other.spare + cached, other.above_floor)
        if part > 0 and other.tenant in asks:
            asks[other.tenant] += part
            more -= part


def _in_turn(holdings: Sequence[Holding], can: Sequence[int], nbytes: int) -> list[int]:
    """Most first: fewer tenants are disturbed."""
    parts = [0] * len(can)
    for index in sorted(range(len(can)), key=lambda i: (-can[i], holdings[i].tenant)):
        parts[index] = min(can[index], nbytes)
        nbytes -= parts[index]
    return parts


def _by_age(holdings: Sequence[Holding], can: Sequence[int], nbytes: int) -> list[int]:
    """Cached bytes older than one age, the same for all.

    Only the oldest age of a tenant is known; its cached bytes are taken to be spread evenly
    between that age and now. The age is found by bisection.
    """

    def older_than(age: float) -> list[int]:
        return [
            int(amount * max(0.0, 1.0 - age / holding.oldest_s)) if holding.oldest_s > 0 else 0
            for holding, amount in zip(holdings, can, strict=True)
        ]

    low, high = 0.0, max((holding.oldest_s for holding in holdings), default=0.0)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(older_than(middle)) > nbytes else (low, middle)
    parts = older_than(high)
    return _top_up(holdings, can, parts, nbytes - sum(parts), by=lambda h: h.oldest_s)


def _top_up(
    holdings: Sequence[Holding], can: Sequence[int], parts: list[int], nbytes: int,
    *, by: Callable[[Holding], float],
) -> list[int]:  # fmt: skip
    """Add what rounding left over, to the largest ``by`` first."""
    for index in sorted(range(len(can)), key=lambda i: -by(holdings[i])):
        more = min(nbytes, can[index] - parts[index])
        parts[index] += more
        nbytes -= more
    return parts


def reserve_bytes(capacity: int) -> int:
    """What those above their fair share leave free, so that extents can be split.

    A split takes room for what it keeps before it gives back more; where all is claimed none could
    begin (docs/adr/0010).
    """
    return min(capacity // 32, MAX_RESERVE)
