"""``KVCache`` against a plain model: the tokens of each sequence, a byte pattern for each token."""

import random
from hashlib import blake2b

import numpy as np
import pytest
from cache_rig import FOREVER, machine_settings, stop_caretaker, tiny_spec
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcached.broker.budget import LocalBudget
from kvcached.cache import KVCache
from kvcached.errors import OwnershipError
from kvcached.testing import FakeBackend, ManualFence

PAGE = 16
STEPS = {"run": 0, "hits": 0, "copies": 0}
SEED = st.integers(0, 1 << 30)


class CacheMachine(RuleBasedStateMachine):
    """The model: for each sequence its salt and its tokens; ``None`` for a token only counted.

    What a token's slot holds depends on the whole prefix, as keys and values do, so a block that
    is found under a wrong prefix reads differently. A counted token writes a pattern of its own.
    """

    @initialize(
        block_size=st.sampled_from([1, 2, 3, 4, 5]), layout=st.sampled_from(["cross", "per"]),
        tokens=st.sampled_from([8, 30, 60]), max_handle=st.sampled_from([16, 48, 256]),
        limit=st.sampled_from([16, 60, 1000, 1000]), prefixes=st.sampled_from([True] * 4 + [False]),
    )  # fmt: skip
    def start(self, block_size, layout, tokens, max_handle, limit, prefixes):
        spec = tiny_spec(block_size=block_size, layout=f"{layout}_layer",
                         head_dim=3 if block_size == 2 else 2)  # fmt: skip
        self.backend, self.size = FakeBackend(PAGE), block_size
        self.budget = LocalBudget(max(limit, 4 * (spec.block_bytes // PAGE + 2)) * PAGE)
        config = type(FOREVER)(broker=False, spare_seconds=1e5, max_handle=str(max_handle))
        self.cache = KVCache(spec, name="machine", max_tokens=tokens, budget=self.budget,
                             backend=self.backend, config=config,
                             prefix_caching=prefixes)  # fmt: skip
        stop_caretaker(self.cache)
        self.clock = 0.0
        self.cache._blocks.clock = lambda: self.clock
        self.live, self.unique, self.fences = [], 0, []

    # --- contents ----------------------------------------------------------------------------

    def places(self, slot):
        """Where the token of a slot has its bytes: (address, length) of each plane or layer."""
        spec, g = self.cache.spec, self.cache.geometry
        block, offset = divmod(slot, self.size)
        width = spec.num_kv_heads * spec.head_dim
        base = self.cache._blocks.pages.address_of(0)
        for part in range(2 * spec.num_layers):
            if g.num_planes == 1:
                start = block * g.block_bytes + part * spec.key_bytes
            else:
                start = part * g.plane_bytes + block * g.block_bytes
            yield base + start + offset * width, width

    def pattern(self, state, position):
        text = repr((state["salt"], state["tokens"][: position + 1])).encode()
        length = sum(length for _, length in self.places(0))
        return blake2b(text, digest_size=length).digest()

    def write(self, state, slots, first):
        for i, slot in enumerate(slots):
            data, done = self.pattern(state, first + i), 0
            for address, length in self.places(slot):
                self.backend.write(address, data[done : done + length])
                done += length

    def read(self, slot):
        return b"".join(self.backend.read(*place) for place in self.places(slot))

    def pick(self, seed):
        return random.Random(seed).choice(self.live)

    def free_blocks_for_certain(self):
        held = {b for state in self.live for b in state["sequence"].block_ids}
        blocks = self.cache._blocks
        return self.cache.geometry.num_blocks - 1 - len(held) - blocks.num_quarantined

    # --- rules -------------------------------------------------------------------------------

    @rule(seed=SEED, length=st.integers(0, 14), salt=st.sampled_from(["", "", "tenant"]),
          filled=st.booleans())  # fmt: skip
    def new(self, seed, length, salt, filled):
        tokens = [random.Random(seed + i).randint(0, 1) for i in range(length)]
        if self.live and seed % 2:  # often the beginning of another
            known = [t for t in self.pick(seed)["tokens"] if isinstance(t, int)]
            tokens = (known + tokens)[:30]
        sequence = self.cache.new_sequence(tokens, salt=salt)
        cached = sequence.num_cached_tokens
        assert cached % self.size == 0 and cached <= max(0, len(tokens) - 1)
        assert sequence.num_tokens == cached == len(sequence.block_ids) * self.size
        STEPS["hits"] += cached > 0
        self.live.append({"sequence": sequence, "salt": salt, "tokens": tokens[:cached],
                          "hope": tokens[cached:]})  # fmt: skip
        if filled:
            self.write_on(self.live[-1], tokens[cached:], named=True)

    @precondition(lambda self: self.live)
    @rule(seed=SEED, count=st.integers(0, 12), named=st.sampled_from([True, True, False]))
    def extend(self, seed, count, named):
        state, rng = self.pick(seed), random.Random(seed)
        ids = (state["hope"] + [rng.randint(0, 1) for _ in range(count)])[:count]
        if not named:  # hoped-for tokens were named to new_sequence, so a count is enough for them
            ids = ids[: len(state["hope"])] + [("?", self.number()) for _ in range(count)]
            ids = ids[:count]
        self.write_on(state, ids, named=named)

    def write_on(self, state, ids, *, named):
        sequence, first, count = state["sequence"], len(state["tokens"]), len(ids)
        before = self.snapshot(), sequence.block_ids
        missing = -(-(first + count) // self.size) - len(sequence.block_ids) + 1
        room = self.free_blocks_for_certain()
        try:
            slots = self.cache.extend(sequence, ids if named else count)
        except MemoryError:
            assert missing > room or self.budget.limit_bytes < self.cache.geometry.reserved_bytes
            assert (self.snapshot(), sequence.block_ids) == before, "I6"
            return
        state["tokens"] = state["tokens"] + ids
        state["hope"] = state["hope"][count:] if ids == (state["hope"] + ids)[:count] else []
        STEPS["copies"] += before[1] != sequence.block_ids[: len(before[1])]
        assert slots.dtype == np.int32 and len(slots) == count
        expected = [sequence.block_ids[p // self.size] * self.size + p % self.size
                    for p in range(first, first + count)]  # fmt: skip
        assert slots.tolist() == expected
        self.write(state, expected, first)

    def number(self):
        self.unique += 1
        return self.unique

    def snapshot(self):
        row = self.cache.stats().to_dict()
        del row["counters"]
        return row

    @precondition(lambda self: self.live)
    @rule(seed=SEED, count=st.integers(0, 3), named=st.booleans())
    def fork(self, seed, count, named):
        state = self.pick(seed)
        twin = self.cache.fork(state["sequence"])
        assert twin.block_ids == state["sequence"].block_ids
        self.live.append(state | {"sequence": twin})
        ids = [1] * count if named else [("?", self.number()) for _ in range(count)]
        if named or not state["hope"]:
            self.write_on(self.live[-1], ids, named=named)

    @precondition(lambda self: self.live)
    @rule(seed=SEED, fenced=st.booleans())
    def free(self, seed, fenced):
        state = self.pick(seed)
        self.live.remove(state)
        fence = ManualFence() if fenced else None
        if fenced:
            self.fences.append(fence)
        self.cache.free(state["sequence"], fence=fence)
        with pytest.raises(OwnershipError, match="freed before"):
            self.cache.free(state["sequence"])
        with pytest.raises(OwnershipError, match="freed before"):
            self.cache.extend(state["sequence"], 1)

    @precondition(lambda self: self.live)
    @rule(seed=SEED, count=st.integers(1, 9))
    def a_forward_pass_fails(self, seed, count):
        """Slots are handed out and never filled; nobody may find them by prefix afterwards."""
        state = self.pick(seed)
        ids = [random.Random(seed + i).randint(0, 1) for i in range(count)]
        try:
            self.cache.extend(state["sequence"], ids)
        except MemoryError:
            return
        self.live.remove(state)
        self.cache.free(state["sequence"], discard=True)

    @precondition(lambda self: self.fences)
    @rule()
    def fences_pass(self):
        for fence in self.fences:
            fence.done = True
        self.fences = []
        self.cache._blocks.poll_fences()

    @rule(what=st.sampled_from(["trim", "evict", "care"]), nbytes=st.integers(0, 200))
    def give_back(self, what, nbytes):
        self.clock += 0.3
        before = self.cache.stats().backed_bytes
        if what == "trim":
            assert self.cache.trim() == before - self.cache.stats().backed_bytes
            assert self.cache.stats().cached_bytes == 0
        elif what == "evict":
            assert self.cache.evict_prefixes(nbytes) == before - self.cache.stats().backed_bytes
        else:
            self.cache.take_care()

    @rule(limit=st.integers(0, 120), idle=st.booleans())
    def set_limit(self, limit, idle):
        if idle:
            with self.cache.idle():
                record = self.cache.set_limit(limit * PAGE)
        else:
            record = self.cache.set_limit(limit * PAGE)
        assert record.held_bytes == self.cache.stats().backed_bytes
        assert record.applied == (record.held_bytes <= limit * PAGE)

    # --- what must hold ----------------------------------------------------------------------

    @invariant()
    def every_live_token_has_its_bytes(self):
        STEPS["run"] += 1
        self.cache.check()
        self.backend.check()
        seen = set()
        for state in self.live:
            sequence = state["sequence"]
            assert sequence.num_tokens == len(state["tokens"])
            for position in range(sequence.num_tokens):
                slot = sequence.block_ids[position // self.size] * self.size + position % self.size
                text = (slot, state["salt"], tuple(state["tokens"][: position + 1]))
                if text not in seen:
                    seen.add(text)
                    assert self.read(slot) == self.pattern(state, position)
        if self.live:
            tables = self.cache.block_tables([state["sequence"] for state in self.live])
            for row, state in zip(tables.tolist(), self.live, strict=True):
                ids = list(state["sequence"].block_ids)
                assert row == ids + [0] * (len(row) - len(ids))

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.close()
            assert self.budget.claimed_bytes == 0
            self.backend.check()
            self.backend.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_cache_is_its_tokens():
    run_state_machine_as_test(CacheMachine, settings=machine_settings(320, 50))
    assert STEPS["run"] > 11_500, f"only {STEPS['run']} steps"
    assert STEPS["hits"] > 100, f"too few hits: {STEPS}"
    assert STEPS["copies"] > 25, f"too few copies: {STEPS}"
