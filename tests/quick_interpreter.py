"""Triton's interpreter without the work that it repeats; what it computes stays the same.

At every call of a device function it goes through all names of ``triton.language`` once more, to
put its own in their place, which the launch has done: about a third of the time of small kernels.
"""

from __future__ import annotations

import functools

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

KNOWN = "3.6."
"""Versions whose interpreter is known to do so; others are left alone."""


def hasten() -> None:
    """Let a launch patch ``triton.language`` once for each module that its functions come from."""
    if not triton.__version__.startswith(KNOWN):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def patch_once(fn):
        if id(fn.__globals__) in done:
            return interpreter._LangPatchScope()
        done.add(id(fn.__globals__))
        return patch(fn)

    def launch_anew(self, *args, **kwargs):
        done.clear()  # what the launch before patched was put back at its end
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
    scalar = functools.cache(interpreter._get_np_dtype)  # which makes a table of all at each call

    def np_dtype(kind):
        kind = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return np.dtype(np.uint64) if isinstance(kind, tl.pointer_type) else scalar(kind)

    interpreter._get_np_dtype = np_dtype
