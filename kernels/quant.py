"""Quantised caches: what their bytes mean, as torch functions that run on any device.

Kernels that read or write such caches must agree with these.

A cache is stored as ``float8_e4m3fn``, ``float8_e5m2``, ``int8``, or as ``uint8`` of half the width
that holds int4: byte ``j`` of a row has dim ``j`` in its low and dim ``j + D / 2`` in its high
nibble, each as value + 8 with values from -7 to 7. So the two halves of a row come out of one load
as two contiguous tiles. An element is ``stored * scale``; scales are float32, of shape ``()`` (one
a tensor), ``[Hkv]`` (one a head) or that of the rows, ``[num_blocks, block_size, Hkv]`` in a cache
(one a token and head; strided or not).
"""

from __future__ import annotations

import torch

from kvcached.errors import InvalidInput

INT4 = torch.uint8
"""The dtype that stores int4, two to a byte."""
LARGEST = {
    torch.float8_e4m3fn: 448.0,
    torch.float8_e5m2: 57344.0,
    torch.int8: 127.0,
    INT4: 7.0,
}
"""The largest stored value of each dtype; the smallest is its negative."""
FP8_CAPABILITY = 8, 9
"""Before it a GPU does not convert fp8, and neither Triton nor the assembler makes up for it."""


def require_hardware(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ``InvalidInput`` if a GPU has no instructions for what ``dtype`` stores."""
    if device.type != "cuda" or not dtype.is_floating_point or dtype.itemsize > 1:
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FP8_CAPABILITY:
        raise InvalidInput(
            f"a cache of {dtype} needs a GPU of compute capability "
            f"{FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or more; this one has {major}.{minor}",
            hint="int8 and int4 caches work on it.",
        )


def row_scales(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A scale for each row: ``x [..., D]`` gives float32 ``[...]``, the largest |x| over the limit.

    A row of zeros gets scale 1.
    """
    largest = x.abs().amax(-1).float()
    # A tensor, not a number: by a number torch multiplies with the inverse on a GPU.
    scale = largest / torch.full_like(largest, _largest(dtype))
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x [..., Hkv, D]`` as ``dtype``: ``x / scale``, cut off at the limit, rounded half to even.

    Returns ``[..., Hkv, D]``, or ``[..., Hkv, D / 2]`` for int4, which takes scales by row only.
    """
    limit = _largest(dtype)
    if dtype == INT4 and (x.shape[-1] % 2 or scale.shape != x.shape[:-1]):
        raise InvalidInput(
            f"int4 needs an even head dim and a scale of shape {tuple(x.shape[:-1])}, not "
            f"{x.shape[-1]} and {tuple(scale.shape)}"
        )
    stored = (x.float() / _spread(scale, x)).clamp(-limit, limit)
    if dtype == INT4:
        low, high = (stored.round() + 8).to(torch.uint8).chunk(2, -1)
        return low | (high << 4)
    return (stored.round() if dtype == torch.int8 else stored).to(dtype)


def dequantize(
    stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``stored * scale`` as ``dtype [..., Hkv, D]``; undoes ``quantize`` but for its rounding."""
    _largest(stored.dtype)
    if stored.dtype == INT4:
        stored = torch.cat([stored & 15, stored >> 4], -1).to(torch.int8) - 8
    return (stored.to(dtype) * _spread(scale, stored).to(dtype)).to(dtype)


def _largest(dtype: torch.dtype) -> float:
    if dtype not in LARGEST:
        names = ", ".join(str(d).removeprefix("torch.") for d in LARGEST)
        raise InvalidInput(f"{dtype} stores no quantised cache; {names} (int4) do")
    return LARGEST[dtype]


def _spread(scale: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``scale`` as something that broadcasts against ``rows [..., Hkv, D]``."""
    if scale.shape not in ((), rows.shape[-2:-1], rows.shape[:-1]):
        raise InvalidInput(
            f"a scale of shape {tuple(scale.shape)} fits no rows of shape {tuple(rows.shape)}; it "
            f"is (), [{rows.shape[-2]}] or {tuple(rows.shape[:-1])}"
        )
    return scale.float() if scale.dim() == 0 else scale.float()[..., None]
