"""The KV cache of LLM servers as virtual memory.

Public names are imported at their first use, so that ``import kvcached`` costs next to nothing
and pulls in no third-party module. ``docs/architecture.md`` explains the whole.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it; the module typing would be most of the import
if TYPE_CHECKING:
    from typing import Any

    from kvcached.cache import KVCache, Sequence
    from kvcached.config import Config
    from kvcached.engines.transformers import ElasticCache
    from kvcached.errors import (
        BackendUnavailable,
        BrokerUnavailable,
        BudgetExceeded,
        ClosedError,
        DriverError,
        EngineUnsupported,
        ForkedProcessError,
        InvalidConfig,
        InvalidInput,
        InvalidSize,
        KvcachedError,
        NameTaken,
        NotAllowed,
        OutOfPages,
        OwnershipError,
        PoolBroken,
        ProtocolError,
        UnknownName,
        UnsafeRuntimeDir,
    )
    from kvcached.layout import CacheSpec
    from kvcached.stats import CacheStats

__all__ = [
    "BackendUnavailable",
    "BrokerUnavailable",
    "BudgetExceeded",
    "CacheSpec",
    "CacheStats",
    "ClosedError",
    "Config",
    "DriverError",
    "ElasticCache",
    "EngineUnsupported",
    "ForkedProcessError",
    "InvalidConfig",
    "InvalidInput",
    "InvalidSize",
    "KVCache",
    "KvcachedError",
    "NameTaken",
    "NotAllowed",
    "OutOfPages",
    "OwnershipError",
    "PoolBroken",
    "ProtocolError",
    "Sequence",
    "UnknownName",
    "UnsafeRuntimeDir",
    "__version__",
]

__version__ = "0.1.0.dev0"

_HOMES = {
    "CacheSpec": "kvcached.layout",
    "CacheStats": "kvcached.stats",
    "Config": "kvcached.config",
    "ElasticCache": "kvcached.engines.transformers",
    "KVCache": "kvcached.cache",
    "Sequence": "kvcached.cache",
}
"""Where a public name is defined; all others are errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        message = f"module 'kvcached' has no attribute {name!r}"
        raise AttributeError(message, name=name)
    value = getattr(import_module(_HOMES.get(name, "kvcached.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
