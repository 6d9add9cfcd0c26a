"""The compiled loops and the same functions run as plain Python leave the same arrays."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from kvcached import _hot
from kvcached._compile import compiled

HISTORY = """
import hashlib, random, sys
import numpy as np
from cache_rig import block_pool
from kvcached.testing import FakeBackend, ManualFence
import pytest

from kvcached import _hot

STEPS, digest = int(sys.argv[1]), hashlib.sha256()
for case, (block, page) in enumerate([(24, 16), (16, 16), (5, 16), (40, 8)]):
    rng = random.Random(case)
    pool = block_pool(FakeBackend(page), block_bytes=block, num_blocks=40, longest=6)
    held, fences = [], []
    for step in range(STEPS):
        what = rng.random()
        if what < 0.4:
            try:
                held += pool.alloc(rng.randint(0, 6)).tolist()
            except MemoryError:
                pass
        elif what < 0.75 and held:
            ids = rng.sample(held, rng.randint(1, len(held)))
            held = [b for b in held if b not in ids]
            for block in ids:
                pool.keep(block, named=rng.random() < 0.5)
            fence = ManualFence() if rng.random() < 0.3 else None
            fences += [fence] if fence else []
            pool.free(np.asarray(ids, np.int32), fence)
        elif what < 0.8 and fences:
            fences.pop(0).done = True
            pool.poll_fences()
        elif what < 0.85 and held:
            ids = np.asarray(held[:2], np.int32)
            pool.share(ids)
            pool.free(ids)
        elif what < 0.9:
            cached = np.flatnonzero(pool.blk[:, _hot.STATE] == _hot.CACHED)[:2].astype(np.int32)
            pool.acquire(cached)
            held += cached.tolist()
        elif what < 0.95:
            pool.reclaim(rng.randint(0, 300))
        else:
            pool.trim()
        for array in (pool.blk, pool.page, pool.ext, pool.meta):
            digest.update(array.tobytes())
    pool.check()
compiled = hasattr(_hot.alloc, "signatures") and bool(_hot.alloc.signatures)
print(digest.hexdigest(), compiled)
"""


def run(steps, **environment):
    path = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", HISTORY, str(steps)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    digest, compiled = done.stdout.split()
    return digest, compiled == "True"


def test_compiled_and_plain_python_agree():
    fast, plain = run(150), run(150, NUMBA_DISABLE_JIT="1")
    assert fast == (plain[0], True)
    assert plain[1] is False
    assert len(plain[0]) == hashlib.sha256().digest_size * 2


@pytest.mark.slow
def test_a_read_only_installation_works(tmp_path):
    """No place for Numba's cache: the loops are compiled for this process only."""
    package = tmp_path / "kvcached"
    package.mkdir()
    source = Path(_hot.__file__).parent
    for name in ("_compile.py", "_hot.py", "_scan.py", "_calls.py", "_bound.py"):
        shutil.copy(source / name, package)
    (package / "__init__.py").touch()
    (package / "__pycache__").touch()  # a file: no directory can be made, even by root
    nowhere = str(package / "__pycache__" / "nowhere")
    code = "import kvcached._hot as h, kvcached._bound; print(h.__file__, bool(h.alloc.signatures))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
        | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": nowhere, "HOME": nowhere},
    )  # fmt: skip
    assert done.stdout.split() == [str(package / "_hot.py"), "True"], done.stderr


@pytest.mark.parametrize(
    "said", ["LLVM bitcode parsing error\nUnknown attribute", "cannot cache f"]
)
def test_a_cache_that_is_of_no_use_is_done_without(monkeypatch, said):
    """Another environment has written it with another LLVM, or there is no place for one."""
    njit = numba.njit

    def without_cache(*signature, cache=False, **options):
        def decorate(function):
            if cache:
                raise RuntimeError(said)
            return njit(*signature, **options)(function)

        return decorate

    monkeypatch.setattr(numba, "njit", without_cache)
    assert compiled(numba.int64(numba.int64))(lambda x: x + 1)(2) == 3
    said = "something else"
    with pytest.raises(RuntimeError, match=said):
        compiled(numba.int64(numba.int64))(lambda x: x + 1)
