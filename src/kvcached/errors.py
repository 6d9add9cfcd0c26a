"""The exception tree: every error says what failed, how much was asked, and what to do.

Codes are stable and documented in ``docs/errors.md``: KV1xx memory and budget, KV2xx device and
driver, KV3xx input and configuration, KV4xx names, ids and life cycle, KV5xx broker and runtime
directory, KV6xx engines.

All classes survive pickling, because errors travel between processes.
"""

from __future__ import annotations

from typing import Any


class KvcachedError(Exception):
    """Base of every error that this library raises on purpose.

    Parameters
    ----------
    message:
        What happened, with the numbers that matter.
    hint:
        What the reader can do about it (a command, a parameter); shown on a line of its own.
    """

    code = "KV100"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        hint = f"\n  {self.hint}" if self.hint else ""
        return f"[{self.code}] {self.message}{hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        # not by __new__: MemoryError and PermissionError have their own, and refuse the others'
        state = self.__dict__.copy()
        given = {name: state[name] for name in ("hint", "status", "call") if name in state}
        return _rebuild, (type(self), self.message, given), state


def _rebuild(cls: type[KvcachedError], message: str, given: dict[str, Any]) -> KvcachedError:
    return cls(message, **given)


# --- KV1xx: memory and budget -------------------------------------------------------------


class OutOfPages(KvcachedError, MemoryError):
    """The device (or the address range) has no physical page left for this request."""

    code = "KV101"


class BudgetExceeded(KvcachedError, MemoryError):
    """The lease refused to grow: the limit, or what the other tenants hold, is in the way.

    ``pending``: others have been asked and may still give; ask again a little later.
    """

    code = "KV102"
    pending = False


class PoolBroken(KvcachedError):
    """A failed operation could not be undone; the pool refuses further work.

    This is the one state in which memory contents may be lost. The pool can only be closed.
    """

    code = "KV103"


# --- KV2xx: device and driver ---------------------------------------------------------------


class BackendUnavailable(KvcachedError):
    """The memory backend cannot be used on this machine (no driver, no VMM support, ...)."""

    code = "KV201"


class DriverError(KvcachedError):
    """A driver or operating-system call failed.

    ``status`` is the name of the driver status or errno (``CUDA_ERROR_INVALID_VALUE``, ``ENOMEM``)
    and ``call`` the function that returned it.
    """

    code = "KV202"

    def __init__(self, message: str, *, status: str, call: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.call = call


class ForkedProcessError(KvcachedError):
    """A cache made before ``fork()`` was used in the child: its memory belongs to the parent."""

    code = "KV203"


# --- KV3xx: input and configuration ---------------------------------------------------------


class InvalidInput(KvcachedError, ValueError):
    """An argument has a value that cannot work (size, dtype, shape, id, message)."""

    code = "KV301"


class InvalidSize(InvalidInput):
    """A size such as ``8G`` or ``40%`` cannot be read, or is out of range."""

    code = "KV305"


class InvalidConfig(InvalidInput):
    """An environment variable or a configuration field has a value that cannot work."""

    code = "KV306"


# --- KV4xx: names, ids and life cycle -------------------------------------------------------


class OwnershipError(KvcachedError):
    """A block was freed twice, freed by a stranger, or used after it was freed."""

    code = "KV401"


class ClosedError(KvcachedError):
    """The object was used after ``close()``."""

    code = "KV402"


class UnknownName(KvcachedError, LookupError):
    """No tenant, layer or device goes by this name."""

    code = "KV410"


class NameTaken(KvcachedError):
    """Another live tenant of the same device already goes by this name."""

    code = "KV411"


# --- KV5xx: broker and runtime directory ----------------------------------------------------


class BrokerUnavailable(KvcachedError):
    """The broker cannot be reached or started."""

    code = "KV501"


class ProtocolError(KvcachedError):
    """A broker message is malformed, of an unknown version, or out of place."""

    code = "KV502"


class UnsafeRuntimeDir(KvcachedError):
    """The runtime directory is not ours alone, so it is not used."""

    code = "KV503"


class NotAllowed(KvcachedError, PermissionError):
    """The peer's user may not do this."""

    code = "KV504"


# --- KV6xx: engines ---------------------------------------------------------------------------


class EngineUnsupported(KvcachedError):
    """The engine, its version or one of its features cannot be made elastic."""

    code = "KV601"
