"""``compiled``: Numba's ``njit`` with a cache on disk, where there is a place for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba as nb

_NO_CACHE = "cannot cache", "LLVM bitcode parsing error"
"""What Numba says if there is no place for a cache, or if one with another LLVM has written it."""


def compiled(*signature: Any, **options: Any) -> Callable[[Any], Any]:
    """``numba.njit``, cached on disk; for this process alone if that cannot be.

    Numba raises for a read-only installation whose user has no cache directory either, and for what
    was cached by another Numba just now, if two environments share the modules.
    """

    def decorate(function: Any) -> Any:
        try:
            return nb.njit(*signature, cache=True, **options)(function)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_CACHE):
                raise
            return nb.njit(*signature, **options)(function)

    return decorate
