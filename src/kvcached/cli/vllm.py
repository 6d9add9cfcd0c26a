"""``kvcached doctor --vllm``: whether the vLLM of this environment becomes elastic, and why not.

Nothing of vLLM is imported: its source is read (``engines/vllm/seams.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import metadata

from kvcached.cli.checks import Check
from kvcached.cli.doctor import check_package, check_settings
from kvcached.config import engine_config, plugin_mode
from kvcached.engines.vllm import seams
from kvcached.errors import InvalidConfig

GROUP, NAME = "vllm.general_plugins", "kvcached"
_MODULE = "kvcached.engines.vllm"


def run_checks(source: seams.Source | None = None) -> list[Check]:
    """All findings. ``source``: see ``seams.survey``."""
    version = seams.installed_version()
    checks = [*check_package(), _check_switch(), *check_settings(engine_config),
              _check_entry_point(), _check_allow_list()]  # fmt: skip
    if version is None:
        return [*checks, Check("vllm", "fail", "not installed here", "pip install vllm")]
    return [*checks, *check_seams(seams.survey(version, source))]


def becomes_elastic(checks: Sequence[Check]) -> bool:
    """Whether ``KVCACHED=1`` makes this vLLM elastic, which is what the exit code says."""
    return all(check.status != "fail" for check in checks)


def verdict(checks: Sequence[Check]) -> str:
    """The last line for a person."""
    if not becomes_elastic(checks):
        return "vLLM cannot become elastic here"
    switched_on = any(check.name == "KVCACHED" and check.status == "ok" for check in checks)
    return "vLLM becomes elastic here" + ("" if switched_on else ", when started with KVCACHED=1")


def _check_switch() -> Check:
    try:
        mode = plugin_mode()
    except InvalidConfig as error:
        return Check("KVCACHED", "fail", error.message, error.hint)
    if mode == "off":
        return Check("KVCACHED", "info", "off in this shell", "KVCACHED=1 vllm serve ...")
    return Check("KVCACHED", "ok", {"on": "on", "strict": "strict: elastic, or an error"}[mode])


def _check_entry_point() -> Check:
    """Without its metadata (a folder on ``PYTHONPATH``) vLLM does not find the plug-in."""
    found = [entry.name for entry in metadata.entry_points(group=GROUP)
             if entry.value.partition(":")[0] == _MODULE]  # fmt: skip
    if NAME in found:
        return Check("plug-in", "ok", f"{NAME!r} in the group {GROUP}")
    return Check("plug-in", "fail", f"{NAME!r} is not in the group {GROUP}",
                 "pip install kvcached-py")  # fmt: skip


def _check_allow_list() -> Check:
    """``VLLM_PLUGINS`` names the plug-ins that vLLM may load, exactly; unset: all."""
    text = os.environ.get("VLLM_PLUGINS")
    if text is None:
        return Check("VLLM_PLUGINS", "ok", "not set, so vLLM loads all plug-ins")
    if NAME in text.split(","):
        return Check("VLLM_PLUGINS", "ok", text)
    wanted = ",".join([*filter(None, text.split(",")), NAME])
    return Check("VLLM_PLUGINS", "fail", f"{text!r} leaves {NAME!r} out",
                 f"export VLLM_PLUGINS={wanted}")  # fmt: skip


def check_seams(found: seams.Survey) -> Iterator[Check]:
    """The version, and each function of vLLM that is replaced or relied on."""
    if found.untested:
        yield Check("vllm", "warn", f"{found.version} was never tried with kvcached")
    else:
        yield Check("vllm", "ok", found.version)
    for place, group in (("scheduler", seams.SCHEDULER), ("worker", seams.WORKER)):
        for seam in group:
            missing = seam in found.missing
            yield Check(place, "fail" if missing else "ok", _describe(seam, missing=missing))
    for seam in seams.ALLOCATIONS.get(found.allocation, ()):
        yield Check("allocation", "ok", f"{_describe(seam)}, {found.allocation}")
    if not found.allocation:
        known = "; or ".join(", ".join(map(str, group)) for group in seams.ALLOCATIONS.values())
        yield Check("allocation", "fail", f"none that is known: {known}")
    if found.problem:
        yield Check("update", "info", "a newer kvcached may know this vLLM",
                    "pip install -U kvcached-py")  # fmt: skip


def _describe(seam: seams.Seam, *, missing: bool = False) -> str:
    parts = ", ".join(seam.parameters or seam.methods)
    text = f"{seam} ({parts})" if parts else str(seam)
    return f"{text} is missing or different" if missing else text
