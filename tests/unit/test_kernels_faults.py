"""Property 7: memory that no sequence owns may be unmapped; touching it would kill the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
SOLVE = """
    from paged import *
    for seed in range(20):
        dtype, lens = DTYPES[seed % len(DTYPES)], (seed, 33, 0, 48)
        case = Case(seed, dtype, 16, 2, 3, 64, 64, lens, (1, 5, 0, 2))
        assert_close(case, solve(case, placement=seed), expect(case))
"""
STRAY = """
    from paged import *
    case = Case(0, torch.float32, 16, 2, 3, 64, 64, (16,), (1,))
    table = case.table()
    with ElasticCache(owned(table), **case.sizes()) as cache:
        q = case.rows()[0]
        attend(q, cache.k, cache.v, page_table=table + {blocks}, **lengths(case))
"""


def _run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], timeout=110, check=False,
        capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")} | env,
    )  # fmt: skip


def test_7_unmapped_neighbours_are_never_touched():
    done = _run(SOLVE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("blocks", "code"), [(0, 0), (1000, -signal.SIGSEGV)])
def test_7_the_neighbours_really_fault(blocks, code):
    done = _run(STRAY.format(blocks=f"({blocks} if int(table[0, 0]) < 3000 else -{blocks})"))
    assert done.returncode == code, done.stderr
