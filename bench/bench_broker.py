"""The budget between processes: claims, reclaim from an idle peer, bytes back after SIGKILL.

Everything is real: a broker of its own in a private runtime directory, peers in processes of
their own, memory that is mapped and touched.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import row, write

SPEC = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64}
BYTES = 256 << 20

PEER = f"""
import sys
from kvcached import CacheSpec, KVCache
from kvcached.memory.views import tensor_from_address
cache = KVCache(CacheSpec(**{SPEC!r}), name=sys.argv[1], max_tokens=1 << 20)

def fill(tokens, at_once):
    batch = [cache.new_sequence() for _ in range(1 if at_once else 8)]
    step = tokens if at_once else cache.spec.block_size
    last = tokens // len(batch) - step
    for start in range(0, last + 1, step):  # as decode does: a block each, in turn
        for number, sequence in enumerate(batch):  # all prefixes differ
            new = [1000 * number + token for token in range(start, start + step)]
            cache.extend(sequence, new)
    for first, count, _ in cache.page_runs():
        tensor_from_address(base + first * page, count * page).fill_(1)
    return batch

base, page = cache.layer(0)[0].data_ptr(), cache.backend.page_bytes
for line in sys.stdin:
    for sequence in fill({BYTES} // cache.spec.token_bytes, line.strip() != "decoded"):
        if line.strip() != "used":
            cache.free(sequence)
    print("ready", flush=True)
cache.close()
"""


class Peer:
    """An engine process that fills 256 MiB when told to, in use or as cached prefixes."""

    def __init__(self, name: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", PEER, name], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)  # fmt: skip

    def fill(self, how: str) -> None:
        """Fill and wait."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{how}\n")
        self.process.stdin.flush()
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError("the peer died")

    def end(self) -> None:
        """Close its input and wait."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def claims() -> list[dict[str, Any]]:
    """A claim that asks the broker, one that the lease covers, and the way back."""
    from kvcached.broker.client import BrokerBudget

    budget = BrokerBudget("bench", device="cpu", limit_bytes=None)
    asked, covered = [], []
    for _ in range(300):
        start = time.perf_counter()
        budget.claim(1 << 20)
        asked.append(time.perf_counter() - start)
        start = time.perf_counter()
        budget.give_back(1 << 20)
        budget.claim(1 << 20)
        covered.append(time.perf_counter() - start)
        budget.give_back(1 << 20)
        with budget._changed:  # noqa: SLF001 - else the lease would cover the next claim too
            budget._return_slack()  # noqa: SLF001
    budget.close()
    return [row("claim that asks the broker", asked, unit="us"),
            row("give back and claim within the lease", covered, unit="us")]  # fmt: skip


def peer_claims(how: str, repeats: int = 15) -> dict[str, Any]:
    """Seconds until 256 MiB of an idle peer's cached prefixes are ours.

    ``how`` they came: ``cached``, all at once, or ``decoded``, block by block.
    """
    from kvcached import CacheSpec, KVCache

    peer, samples = Peer("idle"), []
    with KVCache(CacheSpec(**SPEC), name="claimer", max_tokens=1 << 20) as cache:
        for _ in range(repeats):
            peer.fill(how)
            sequence = cache.new_sequence()
            start = time.perf_counter()
            cache.extend(sequence, BYTES // cache.spec.token_bytes)
            samples.append(time.perf_counter() - start)
            cache.free(sequence)
            cache.trim()
    peer.end()
    came = "that came at once" if how == "cached" else "that decode filled block by block"
    return row(f"claim 256 MiB of an idle peer's prefixes {came}", samples, unit="ms")


def kills(repeats: int = 7) -> dict[str, Any]:
    """Seconds from SIGKILL of a peer that holds 256 MiB in use until we could claim them."""
    from kvcached import CacheSpec, KVCache

    samples = []
    with KVCache(CacheSpec(**SPEC), name="survivor", max_tokens=1 << 20) as cache:
        for index in range(repeats):
            peer = Peer(f"victim-{index}")
            peer.fill("used")
            start = time.perf_counter()
            peer.process.kill()
            sequence = cache.new_sequence()
            while True:
                try:
                    cache.extend(sequence, BYTES // cache.spec.token_bytes)
                    break
                except MemoryError:
                    time.sleep(0.0005)
            samples.append(time.perf_counter() - start)
            peer.end()
            cache.free(sequence)
            cache.trim()
    return row("SIGKILL of a peer to its 256 MiB claimed", samples, unit="ms")


def main() -> None:
    """Measure and write ``broker.json``."""
    with tempfile.TemporaryDirectory(prefix="kvc-") as folder:
        os.environ["KVCACHED_RUNTIME_DIR"] = f"{folder}/r"
        os.environ["KVCACHED_BUDGET"] = str(BYTES + (24 << 20))
        rows = [*claims(), peer_claims("cached"), peer_claims("decoded"), kills()]
    write("broker", "budget between processes, host backend", rows)


if __name__ == "__main__":
    main()
