"""What the workers of one engine back for a block, where pipeline stages have unlike many layers.

A block has the same id in all workers and a size of its own in each: so many bytes a layer. The
scheduler's page pool must not care. So it counts in pages of all: behind such a page lie, in each
worker, the pages of the same blocks, be their bytes in a plane for each layer or in one place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from kvcached.errors import EngineUnsupported
from kvcached.layout import Geometry
from kvcached.memory.remote import Share

_HINT = "Unset KVCACHED, and please report this."


class Stages(NamedTuple):
    """``geometry`` is in bytes of the worker that holds most; ``shares``: of each worker."""

    geometry: Geometry
    shares: tuple[Share, ...]

    @property
    def leader(self) -> int:
        """A worker that holds most."""
        weights = [share.weight for share in self.shares]
        return weights.index(max(weights))

    def factor(self, ranks: Sequence[int]) -> Fraction:
        """What these workers hold together, in terms of the one that holds most."""
        return Fraction(sum(self.shares[rank].weight for rank in ranks),
                        self.shares[self.leader].weight)  # fmt: skip


def stages_of(said: Sequence[dict[str, Any]]) -> Stages:
    """From what the workers say of themselves (``Region.describe``).

    Workers whose blocks are alike back the same pages. Else the step is what one page of the
    largest common part of a block holds: for layers of equal size, one page of each layer.

    Raises ``EngineUnsupported`` where their blocks are not the same ones.
    """
    common = {(str(body["device"]).partition(":")[0], body["num_blocks"], body["page_bytes"])
              for body in said}  # fmt: skip
    if len(common) != 1:
        raise EngineUnsupported(
            f"the workers of this engine have KV caches of different shapes: {sorted(common)}",
            hint=_HINT,
        )
    ((_, blocks, page),) = common
    own = [Geometry(body["block_bytes"], body["num_planes"], blocks, page) for body in said]
    if len(set(own)) == 1:
        return Stages(own[0], (Share(),) * len(own))
    unit = math.gcd(*(geometry.block_bytes for geometry in own))
    shares = tuple(Share(g.num_planes, g.block_bytes // unit) for g in own)
    most = max(share.weight for share in shares)
    whole = Geometry(unit * most, 1, blocks, page * most)
    for body, share, geometry in zip(said, shares, own, strict=True):
        plane = whole.num_pages * share.pages * page
        fits = plane * share.planes <= body["reserved_bytes"]
        if not fits or (share.planes > 1 and plane != geometry.plane_bytes):
            raise EngineUnsupported(
                f"the blocks of this engine's workers, of {geometry.block_bytes} bytes and others, "
                f"have no more than {unit} bytes in common",
                hint="Unset KVCACHED, or use as many layers in each pipeline stage.",
            )
    return Stages(whole, shares)
