"""Torch tensors over raw addresses, by DLPack through ctypes. The only torch in ``memory/``.

``torch.utils.dlpack.from_dlpack`` takes the address as it is and never reads it, so a tensor can
cover reserved address space of which nothing is mapped yet. The capsule is made
here, with a struct layout that DLPack fixed in its first version (dmlc/dlpack, ``dlpack.h``).

A view reads what is mapped now: touching an unmapped byte is SIGSEGV on the CPU and a fault on a
GPU. So ``ElasticTensor`` prints its shape only, and refuses to be copied or pickled whole.
"""

from __future__ import annotations

import ctypes
from typing import Any, NoReturn

import torch
from torch.utils.dlpack import from_dlpack

from kvcached.errors import InvalidInput
from kvcached.layout import CacheSpec, Geometry

_DLPACK_DEVICE = {"cpu": 1, "cuda": 2}
_DLPACK_UINT = 1


class _DLDevice(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (
        ("tensor", _DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


# Torch reads ``deleter`` when the last view dies, which may be at interpreter exit. So the structs
# are never freed: one of 80 bytes per reservation. The deleter is NULL: no callback into Python.
_KEPT: dict[tuple[int, int, str], _DLManagedTensor] = {}

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class ElasticTensor(torch.Tensor):  # type: ignore[misc, unused-ignore]
    """A view of address space that may not be mapped everywhere.

    Printing shows shape and dtype and reads nothing; copying or pickling the whole raises. All else
    is a plain tensor's: operations and slices return plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # noqa: SLF001 - as torch documents

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Shape, dtype and device; never the contents."""
        shape, dtype = tuple(self.shape), str(self.dtype).removeprefix("torch.")
        return f"ElasticTensor(shape={shape}, dtype={dtype}, device={self.device}, contents unread)"

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse: it would read pages that are not mapped."""
        raise _refuse("copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse: it would read pages that are not mapped."""
        raise _refuse("pickled")


def _refuse(what: str) -> InvalidInput:
    return InvalidInput(
        f"an elastic view cannot be {what} whole: parts of it are not mapped",
        hint="Take the blocks of one sequence first, as in k[block_ids].",
    )


def tensor_from_address(address: int, nbytes: int, device: str = "cpu") -> torch.Tensor:
    """A 1-D uint8 tensor over ``nbytes`` from ``address``; reads nothing.

    ``device`` is ``"cpu"``, ``"cuda"`` or ``"cuda:<ordinal>"``. The tensor does not own the memory:
    whoever reserved it closes it after the last use. Raises ``InvalidInput``.
    """
    kind, _, index = device.partition(":")
    if kind not in _DLPACK_DEVICE or (index and not index.isdecimal()):
        raise InvalidInput(f"{device!r} is not a device", hint="Use 'cpu' or 'cuda:0'.")
    if address <= 0 or nbytes <= 0:
        raise InvalidInput(f"cannot view {nbytes} bytes at address {address:#x}")
    managed = _KEPT.get((address, nbytes, device))
    if managed is None:
        # setdefault: two threads must end up with the same struct, or one would be freed.
        made = _describe(address, nbytes, _DLPACK_DEVICE[kind], int(index or 0))
        managed = _KEPT.setdefault((address, nbytes, device), made)
    capsule = _new_capsule(ctypes.addressof(managed), b"dltensor", None)
    flat: torch.Tensor = from_dlpack(capsule)
    return flat.as_subclass(ElasticTensor)


def _describe(address: int, nbytes: int, device_type: int, device_id: int) -> _DLManagedTensor:
    managed = _DLManagedTensor()
    tensor = managed.tensor
    tensor.data = address
    tensor.device = _DLDevice(device_type, device_id)
    tensor.ndim = 1
    tensor.dtype = _DLDataType(_DLPACK_UINT, 8, 1)
    tensor.shape = (ctypes.c_int64 * 1)(nbytes)
    tensor.strides = (ctypes.c_int64 * 1)(1)
    return managed


def layer_views(
    spec: CacheSpec, geometry: Geometry, address: int, device: str, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of one layer over the reservation at ``address``.

    Both are strided views ``[num_blocks, block_size, num_kv_heads, dim]`` of ``spec.dtype``, and
    nothing is copied. A block is contiguous from slot to dim. For MLA the values are the first
    ``mla_value_dim`` elements of the keys. In the per-layer layout plane ``2 * layer`` holds the
    keys and the next one the values. Raises ``InvalidInput``.
    """
    if not 0 <= layer < spec.num_layers:
        raise InvalidInput(f"layer {layer} does not exist: there are {spec.num_layers}")
    dtype = getattr(torch, spec.dtype)
    flat = tensor_from_address(address, geometry.reserved_bytes, device).view(dtype)
    key_start, value_start = _starts(spec, geometry, layer)
    keys = _view(flat, spec, geometry, key_start, spec.head_dim)
    if spec.value_bytes:
        return keys, _view(flat, spec, geometry, value_start, spec.value_dim)
    return keys, keys[..., : spec.mla_value_dim].as_subclass(ElasticTensor)


def _starts(spec: CacheSpec, geometry: Geometry, layer: int) -> tuple[int, int]:
    """The bytes before block 0's keys and values of ``layer``."""
    if spec.layout == "cross_layer":
        start = layer * (spec.key_bytes + spec.value_bytes)
        return start, start + spec.key_bytes
    planes_per_layer = geometry.num_planes // spec.num_layers
    start = layer * planes_per_layer * geometry.plane_bytes
    return start, start + geometry.plane_bytes


def _view(
    flat: torch.Tensor, spec: CacheSpec, geometry: Geometry, start: int, dim: int
) -> torch.Tensor:
    size = (geometry.num_blocks, spec.block_size, spec.num_kv_heads, dim)
    block_stride = geometry.block_bytes // spec.itemsize
    stride = (block_stride, spec.num_kv_heads * dim, dim, 1)
    return flat.as_strided(size, stride, start // spec.itemsize).as_subclass(ElasticTensor)
