"""Fork without exec: the child gets errors, whatever lock a thread held when it was made."""

import os
import subprocess
import sys

import pytest

# Runs in a process of its own, so that nothing of pytest is forked.
FORKING = """
import os, sys, threading, warnings
warnings.simplefilter("ignore")
from kvcached.broker.budget import LocalBudget
from kvcached.cache import KVCache
from kvcached.config import Config
from kvcached.errors import ForkedProcessError
from kvcached.layout import CacheSpec
cache = KVCache(CacheSpec(2, 1, 64), name="forked", budget=LocalBudget(1 << 30),
                config=Config(broker=False))
sequence = cache.new_sequence()
cache.extend(sequence, 40)
keys = cache.layer(0)[0]
keys[list(sequence.block_ids)] = 3
held, enough = threading.Event(), threading.Event()

def hold():  # as the caretaker does, or the budget's thread, when a fork falls into their work
    with cache._lock:
        held.set()
        enough.wait()

holder = threading.Thread(target=hold)
holder.start()
held.wait()
child = os.fork()
if child == 0:
    for use in (cache.new_sequence, cache.trim, cache.stats, lambda: cache.extend(sequence, 1),
                lambda: cache.free(sequence), lambda: cache.block_tables([sequence])):
        try:
            use()
        except ForkedProcessError as error:
            assert "child" in str(error) and error.hint
        else:
            os._exit(7)
    assert "of process" in repr(cache) and "of process" in cache._repr_html_()
    cache.close()
    del cache, keys
    sys.exit(0)  # runs what is registered for exit
_, status = os.waitpid(child, 0)
enough.set()
holder.join()
assert os.waitstatus_to_exitcode(status) == 0, status
assert (keys[list(sequence.block_ids)] == 3).all()
cache.check()
cache.extend(sequence, 100)
cache.close()
print("fine")
"""


def test_a_forked_child_is_told_and_leaves_the_parent_alone():
    pytest.importorskip("torch", reason="a layer is a tensor")
    done = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"KVCACHED_BROKER": "0"},
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr
    assert "Traceback" not in done.stderr
