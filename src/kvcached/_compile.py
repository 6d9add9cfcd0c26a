"""``compiled``: Numba's ``njit`` with a cache on disk, where there is a place for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba as nb


def compiled(*signature: Any, **options: Any) -> Callable[[Any], Any]:
    """``numba.njit``, cached on disk; for this process alone if no directory can be written.

    Numba raises for a read-only installation whose user has no cache directory either.
    """

    def decorate(function: Any) -> Any:
        try:
            return nb.njit(*signature, cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return nb.njit(*signature, **options)(function)

    return decorate
