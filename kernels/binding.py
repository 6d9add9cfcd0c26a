"""``bind``: a call that was checked and prepared once, to be made again and again.

A model makes the same calls at every step, with other contents. ``bind`` takes a function of this
package with its arguments and gives back the call: calling it queues the kernels, and costs the
host about as much as the driver does. Tensors that differ from call to call are given to it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvcached.errors import InvalidInput
from kvcached.kernels import append, attention, mla
from kvcached.kernels._workspace import make_workspace
from kvcached.kernels.checks import check_call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvcached.kernels._bound import Bound, Launch
    from kvcached.kernels._tensor_maps import TensorMap
    from kvcached.kernels.checks import AttentionCall
    from kvcached.kernels.mla_plan import MlaPlan
    from kvcached.kernels.plan import Plan

_TAKES: dict[Callable[..., Any], tuple[str, ...]] = {
    attention.attn_with_kvcache: ("q", "out", "cache_seqlens", "page_table", "cache_start",
                                  "k_cache", "v_cache", "sinks", "alibi_slopes"),
    mla.mla_with_kvcache: ("q", "out", "cache_seqlens", "page_table"),
    append.reshape_and_cache: ("key", "value", "slot_mapping", "k_cache", "v_cache"),
    append.concat_and_cache_mla: ("kv_c", "k_pe", "slot_mapping"),
}  # fmt: skip
"""What can be bound, and the arguments that may be replaced."""
_signature = functools.cache(inspect.signature)


def bind(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> BoundCall:
    """``function(*args, **kwargs)`` as a ``BoundCall``: checked and compiled, not made.

    ``function`` is ``attn_with_kvcache``, ``mla_with_kvcache``, ``reshape_and_cache`` or
    ``concat_and_cache_mla``. On a GPU the memory for partial results is the plan's, if one is
    given, or the bound call's own. A plan must be updated before, if it is at all; after its first
    update calls must be bound anew.

    Raises ``InvalidInput`` for what the function refuses, and for tensors of which the kernels take
    a copy (index tensors with gaps, ``sinks`` that are no float32, ``q`` of a negative scale): a
    later call would not see what they hold by then.
    """
    takes = _TAKES.get(function)
    if takes is None:
        every = ", ".join(one.__name__ for one in _TAKES)
        raise InvalidInput(f"{function!r} cannot be bound", hint=f"These can: {every}.")
    given = _signature(function).bind(*args, **kwargs).arguments
    if given.get("k") is not None or given.get("v") is not None:
        raise InvalidInput("k and v cannot be bound", hint="Bind reshape_and_cache apart.")
    names = [name for name in takes if name == "out" or given.get(name) is not None]
    first = given[names[0]]
    if not isinstance(first, torch.Tensor) or not _on_gpu(first):
        return BoundCall(function, given, names)
    device = first.device if first.is_cuda else -1
    with torch.cuda.device(device):  # kernels are loaded into the current one
        launches, used, results = _PREPARE[function](**given)
    return BoundCall(function, given, names, launches, used, results)


class BoundCall:
    """A call with its tensors, made by ``bind``: ``call()``, or ``call(*tensors)``.

    Without arguments it is made with the tensors that it was bound to, and what they hold by then.
    ``takes`` names those that others of the same shape, strides, dtype and alignment (to 16 bytes)
    may replace: the first few are given, in that order. Caches are among them, so one serves all
    layers of a model that differ in nothing else. It returns what the function does; an output that
    ``bind`` was not given, and an LSE, are its own and written at each call.

    Calls run on the current stream, one after another: for several streams bind several, with a
    plan each. A call may be captured in a CUDA graph, which needs it alive, and made by several
    threads. On the CPU it is the function with its arguments.

    Raises ``InvalidInput`` for a tensor that does not fit, and ``DriverError`` if the driver
    refuses.
    """

    def __init__(
        self, function: Callable[..., Any], given: Mapping[str, Any], takes: Sequence[str],
        launches: Sequence[Launch] | None = None, used: Mapping[str, Any] | None = None,
        results: Sequence[torch.Tensor] = (),
    ) -> None:  # fmt: skip
        self.takes = tuple(takes)
        """Names of the arguments that may be given anew, in their order."""
        self._function, self._given = function, dict(given)
        self._launches: Sequence[Launch] | None = None
        self._results: tuple[Any, ...] = tuple(results)
        if launches is None or used is None:
            return
        from kvcached.kernels._launch import device_here, stream_of

        _refuse_copies(given, used, launches)
        self._stream_of, self._device_here = stream_of, device_here
        self._index = used[takes[0]].get_device()
        self._taken = [used[name] for name in takes]
        self._given["out"] = used.get("out")
        self._forms = [_form_of(self._given[name]) for name in takes]
        self._launches, self._least = launches, 0
        self._replacing: dict[int, tuple[list[Bound], list[tuple[int, TensorMap]]]] = {}

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Make the call, with ``tensors`` in place of the first that it takes."""
        if self._launches is None:
            return self._function(**self._given | dict(zip(self.takes, tensors, strict=False)))
        if self._device_here() != self._index:
            with torch.cuda.device(self._index):
                return self(*tensors)
        if tensors:
            self.at(self._addresses(tensors))
        else:
            stream = self._stream_of(self._index)
            for step in (self._replacing.get(0) or self._replace(0))[0]:
                step.again(stream)
        if not self._results:
            return None
        out = tensors[1] if len(tensors) > 1 else self._results[0]
        return out if len(self._results) == 1 else (out, self._results[1])

    @property
    def takes_addresses(self) -> bool:
        """Whether ``at`` can make it: it was bound on a GPU."""
        return self._launches is not None

    def at(self, addresses: list[int]) -> None:
        """Make the call with tensors that lie at ``addresses``; the maps of some are added to them.

        Nothing is checked: the caller knows that they are as those of ``takes``.
        """
        if self._device_here() != self._index:
            with torch.cuda.device(self._index):
                return self.at(addresses)
        stream = self._stream_of(self._index)
        steps, maps = self._replacing.get(len(addresses)) or self._replace(len(addresses))
        given: list[Any] = addresses
        for i, one in maps:
            given.append(one.at(addresses[i]))
        for step in steps:
            step(stream, given)
        return None

    def _addresses(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """Of the tensors of a call; raises ``InvalidInput`` if one does not fit."""
        forms = self._forms
        addresses: list[int] = []
        try:
            for i, x in enumerate(tensors):
                address = x.data_ptr()
                form = address & 15, x.dtype, x.shape, x.stride(), x.get_device()
                if form != forms[i]:
                    raise InvalidInput(_misfit(self.takes[i], form, forms[i]))
                addresses.append(address)
        except (AttributeError, IndexError):
            raise InvalidInput(
                f"{len(tensors)} arguments, but a call takes tensors: {', '.join(self.takes)}"
            ) from None
        return addresses

    def _replace(self, count: int) -> tuple[list[Bound], list[tuple[int, TensorMap]]]:
        """The launches with the first ``count`` tensors replaced, and the maps of those.

        Of each map comes the place of its tensor among them.
        """
        from kvcached.kernels._bound import Bound
        from kvcached.kernels._tensor_maps import TensorMap

        assert self._launches is not None, "what is bound on the CPU is not replaced"
        taken = self._taken[:count]
        if len(taken) < self._least:
            raise InvalidInput(
                f"{count} tensors, but this call keeps none: it takes {', '.join(self.takes)}"
            )
        caches = {x: i for i, x in enumerate(taken) if isinstance(x, int)}
        given = {id(x): x for launch in self._launches for x in launch.arguments}
        maps = [x for x in given.values() if isinstance(x, TensorMap) and x.address in caches]
        mapped = {one.address for one in maps}
        other = sum(isinstance(x, bytes) for x in given.values()) - len(maps)
        stays = any(id(x) not in given and x not in mapped for x in caches)
        if self._launches and caches and (other or stays):
            raise InvalidInput(f"{self._function.__name__} cannot take another cache here")
        steps = [Bound(launch, [*taken, *maps]) for launch in self._launches]
        self._replacing[count] = steps, [(caches[one.address], one) for one in maps]
        return self._replacing[count]

    def release(self) -> BoundCall:
        """Keep the tensors no longer that it was bound to, and return it.

        From now on each call gives all that it takes.
        """
        count = len(self.takes)
        if self._launches is not None:
            self._replace(count)
            self._least, self._launches, self._taken = count, (), []
            self._results = (None, *self._results[1:]) if self._results else ()
        self._given = {k: x for k, x in self._given.items() if k not in self.takes}
        return self


def _on_gpu(tensor: torch.Tensor) -> bool:
    """Whether kernels are launched for it; tests with a fake driver say yes for CPU tensors."""
    return bool(tensor.is_cuda)


def _form_of(x: torch.Tensor) -> tuple[Any, ...]:
    """What kernels and launches are made for."""
    return x.data_ptr() & 15, x.dtype, x.shape, x.stride(), x.get_device()


def _misfit(name: str, form: tuple[Any, ...], bound: tuple[Any, ...]) -> str:
    parts = ("address modulo 16", "dtype", "shape", "strides", "device")
    unlike = [f"{part} {a} instead of {b}" for part, a, b in zip(parts, form, bound, strict=True)
              if a != b]  # fmt: skip
    return f"{name} has {', '.join(unlike)}: bind such calls apart"


def _refuse_copies(
    given: Mapping[str, Any], used: Mapping[str, Any], launches: Sequence[Launch]
) -> None:
    """What a launch reads must be what was given, or it would not see later contents."""
    from kvcached.kernels._bound import address_of

    taken = {id(x) for launch in launches for x in launch.arguments}
    for name, x in used.items():
        if launches and id(x) not in taken and not isinstance(x, int):  # caches may be maps
            raise InvalidInput(
                f"{name} cannot be bound: the kernels take a copy of it",
                hint="Index tensors are contiguous int32, sinks and slopes float32, "
                "softmax_scale is not negative.",
            )
        if name in given and given[name] is not x and address_of(x) != given[name].data_ptr():
            raise InvalidInput(f"{name} cannot be bound: it is converted at every call")


_Prepared = tuple["list[Launch]", dict[str, Any], tuple[torch.Tensor, ...]]


def _attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, num_splits: int = 0,
    plan: Plan | None = None, *, return_softmax_lse: bool = False, **options: Any,
) -> _Prepared:  # fmt: skip
    options.pop("k", None), options.pop("v", None)
    call = check_call(q, k_cache, v_cache, **options)
    results = (call.out, call.lse) if return_softmax_lse else (call.out,)
    used = _used(call) | {"k_cache": call.kv.k_ptr, "v_cache": call.kv.v_ptr}
    return attention.prepare(call, num_splits, plan, make_workspace), used, results


def _mla(
    q: torch.Tensor, kv_cache: torch.Tensor, page_table: Any, cache_seqlens: Any,
    head_dim_v: int = 512, *, plan: MlaPlan | None = None, **options: Any,
) -> _Prepared:  # fmt: skip
    call = mla.check_mla(q, kv_cache, page_table, cache_seqlens, head_dim_v, **options)
    memory = mla.plan_memory(call, plan) or make_workspace
    return mla.prepare(call, memory=memory), _used(call), (call.out, call.lse)


def _append(*args: Any, **given: Any) -> _Prepared:
    call = append.check_append(*args, **given)
    launches = append.prepare(call)
    caches = launches[0].arguments[2:4] if launches else (call.k_cache, call.v_cache)
    used = {"key": call.key, "value": call.value, "slot_mapping": call.slots}
    return launches, used | dict(zip(("k_cache", "v_cache"), caches, strict=True)), ()


def _append_mla(**given: Any) -> _Prepared:
    launches, used, _ = _append(*append.split_latents(**given))
    return launches, dict(zip(("kv_c", "k_pe", "slot_mapping"), used.values(), strict=False)), ()


def _used(call: AttentionCall) -> dict[str, Any]:
    """The tensors of a checked call, by the names of the arguments that they were."""
    used = {
        "q": call.q, "out": call.out, "cache_seqlens": call.lens, "page_table": call.table,
        "cache_start": call.starts, "cu_seqlens_q": call.q_starts, "custom_mask": call.masks,
        "sinks": call.sinks, "alibi_slopes": call.slopes, "k_descale": call.k_scale,
        "v_descale": call.v_scale,
    }  # fmt: skip
    return {name: x for name, x in used.items() if x is not None}


_PREPARE: dict[Callable[..., Any], Callable[..., _Prepared]] = {
    attention.attn_with_kvcache: _attention,
    mla.mla_with_kvcache: _mla,
    append.reshape_and_cache: _append,
    append.concat_and_cache_mla: _append_mla,
}
