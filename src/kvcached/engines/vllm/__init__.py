"""vLLM on elastic memory: the plug-in that vLLM loads (entry point group ``vllm.general_plugins``).

``KVCACHED=1 vllm serve ...`` is all that a user does. What is replaced in vLLM is listed in
``seams.py``; everything that vLLM decides (prefix cache, reference counts, preemption) stays its.

* ``sizing.py``, ``region.py`` run where the worker is: how many addresses, and the tensors.
* ``queue.py``, ``steps.py``, ``tenant.py`` run where the scheduler is: which blocks have memory;
  ``attach.py``, ``stages.py`` are between the two.
"""

from __future__ import annotations

from kvcached.config import plugin_mode


def register() -> None:
    """Make the vLLM of this process elastic, if ``KVCACHED`` says so. vLLM calls this in each."""
    mode = plugin_mode()
    if mode == "off":
        return
    from kvcached.engines.vllm.install import install  # vLLM is there, and wanted elastic

    install(strict=mode == "strict")
