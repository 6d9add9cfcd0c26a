"""A small plain model of what vLLM does with blocks: pool, prefix hashes, requests, steps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Block:
    """As vLLM's ``KVCacheBlock``: what the queue reads of it, and its references."""

    block_id: int
    ref_cnt: int = 0
    block_hash: tuple | None = None


class Pool:
    """As vLLM's ``BlockPool``, over a queue that ``make_queue`` makes of all blocks.

    ``matched`` are blocks that were looked up and not taken yet: they must not be evicted.
    """

    def __init__(self, num_blocks, make_queue):
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.queue = make_queue(self.blocks)
        self.by_hash: dict[tuple, dict[int, Block]] = {}
        self.null = self.queue.popleft()
        self.matched: set[int] = set()
        self.evicted = 0
        self.queue.bind(self)

    def lookup(self, hashes):
        """The longest run of blocks that hold these hashes."""
        found = []
        for wanted in hashes:
            if wanted not in self.by_hash:
                break
            found.append(next(iter(self.by_hash[wanted].values())))
        self.matched = {block.block_id for block in found}
        return found

    def name(self, block, block_hash):
        if block.block_hash is None:
            block.block_hash = block_hash
            self.by_hash.setdefault(block_hash, {})[block.block_id] = block

    def _maybe_evict_cached_block(self, block):
        if block.block_hash is None:
            return False
        assert block.ref_cnt == 0, "evicted though in use"
        assert block.block_id not in self.matched, "evicted between lookup and touch"
        same = self.by_hash[block.block_hash]
        del same[block.block_id]
        if not same:
            del self.by_hash[block.block_hash]
        block.block_hash = None
        self.evicted += 1
        return True

    def touch(self, blocks):
        for block in blocks:
            if block.ref_cnt == 0:
                self.queue.remove(block)
            block.ref_cnt += 1
        self.matched = set()

    def get_new_blocks(self, count):
        if count > self.queue.num_free_blocks:
            raise ValueError(f"Cannot get {count} free blocks from the pool")
        taken = self.queue.popleft_n(count)
        assert len(taken) == count
        for block in taken:
            self._maybe_evict_cached_block(block)
            assert block is not self.null
            assert block.ref_cnt == 0, "handed out twice"
            block.ref_cnt = 1
        return taken

    def free_blocks(self, ordered):
        first, last = [], []
        for block in ordered:
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                (first if block.block_hash is None else last).append(block)
        self.queue.prepend_n(first)
        self.queue.append_n(last)

    def reset_prefix_cache(self):
        if len(self.blocks) - self.queue.num_free_blocks != 1:
            return False
        self.by_hash = {}
        for block in self.blocks:
            block.block_hash = None
        return True


@dataclass(eq=False)
class Request:
    """``prompt`` names its blocks: equal beginnings share. ``hits`` of them were found."""

    prompt: tuple[int, ...]
    blocks: list[Block] = field(default_factory=list)
    hits: int = 0

    def chain(self, index):
        """What block ``index`` holds: the hash of all up to it."""
        return self.prompt[: index + 1]


@dataclass
class Step:
    """One forward pass: which blocks it writes with what, and which it reads as what."""

    writes: list[tuple[int, tuple]] = field(default_factory=list)
    reads: list[tuple[int, tuple]] = field(default_factory=list)

    @property
    def touched(self):
        return {0, *(block for block, _ in self.writes + self.reads)}
