"""A compiled function over layer views, while extents come and go; on the host and on a GPU."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

BLOCKS = 4


@torch.compiler.disable
def write(keys, values, ids, new):
    """Outside of the graph: a compiler that makes writes functional would copy the whole view."""
    keys[ids, 0] = new
    values[ids, 1] = -new


def step(keys, values, ids, new):
    write(keys, values, ids, new)
    return (keys[ids].float() * 2 + values[ids].float()).sum((1, 2, 3))


def check_compiled_views(cache, backend):
    """Compiled and eager agree before and after growth, trim and regrowth, compiled once."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, backend=backend, dynamic=False)
    sequence = cache.new_sequence()
    cache.extend(sequence, BLOCKS * cache.spec.block_size)
    # Plain views: some backends refuse a subclass of Tensor, and the graph reads blocks only.
    keys, values = (part.as_subclass(torch.Tensor) for part in cache.layer(1))
    ids = torch.tensor(sequence.block_ids, device=keys.device)

    def round_trip():
        shape = (BLOCKS, *keys.shape[1:])
        keys[ids] = torch.randn(shape, device=keys.device).to(keys.dtype)
        values[ids] = torch.randn(shape, device=keys.device).to(keys.dtype)
        new = torch.randn((BLOCKS, *keys.shape[2:]), device=keys.device).to(keys.dtype)
        before = keys[ids].clone(), values[ids].clone()
        want = step(keys, values, ids, new)
        wrote = keys[ids].clone(), values[ids].clone()
        keys[ids], values[ids] = before
        got = compiled(keys, values, ids, new)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)
        assert torch.equal(keys[ids], wrote[0])
        assert torch.equal(values[ids], wrote[1])

    round_trip()
    graphs = dict(counters["stats"])
    assert graphs["unique_graphs"] >= 1
    for blocks in (64, 8, 256):
        other = cache.new_sequence()
        cache.extend(other, blocks * cache.spec.block_size)
        round_trip()
        cache.free(other)
        if keys.is_cuda:
            torch.cuda.synchronize(keys.device)
        cache.trim()  # splits the extent that the sequence shares, moves nothing
        round_trip()
    assert dict(counters["stats"]) == graphs, "growth is no reason to compile again"
    cache.free(sequence)
    torch._dynamo.reset()
