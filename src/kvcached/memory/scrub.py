"""Whether fresh device memory has to be cleared, by the policy ``zero`` (docs/security.md).

NVIDIA documents nothing about the contents of a fresh allocation. The driver clears memory when it
is freed, for every data-centre GPU since Kepler, unless ``RMDisableScrubOnFree`` is set among its
registry keys (open-gpu-kernel-modules, ``mem_mgr.c``). What it was told stands in ``/proc``; where
that cannot be read, as under WSL or in some containers, nothing is taken for granted.
"""

from __future__ import annotations

from kvcached.errors import InvalidInput

PARAMS = "/proc/driver/nvidia/params"
POLICIES = ("never", "on-tenant-change", "always")
_DISABLES = "rmdisablescrubonfree"


def must_clear(policy: str, params: str = PARAMS) -> bool:
    """Whether this process clears a handle before anybody can read it.

    Pages never go from one process to another but through the driver, so with
    ``on-tenant-change`` that is so exactly where the driver may not have done it.
    """
    if policy not in POLICIES:
        raise InvalidInput(f"zero={policy!r} is unknown", hint=f"Use one of {POLICIES}.")
    return policy == "always" or (policy == "on-tenant-change" and not driver_clears(params))


def driver_clears(params: str = PARAMS) -> bool:
    """Whether the driver is known to clear what is freed."""
    try:
        with open(params, encoding="utf-8", errors="replace") as file:
            return _DISABLES not in file.read(1 << 16).lower()
    except OSError:
        return False
