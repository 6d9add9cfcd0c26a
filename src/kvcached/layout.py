"""Bytes, strides and the arithmetic between blocks and pages. Integers only, no torch.

``CacheSpec`` says what one block holds; ``Geometry`` lays blocks over pages.

Two layouts (docs/adr/0002). *Cross-layer* (default): one block is one contiguous record
``[layer][K|V][slot][kv head][dim]``, so the address space is one *plane*. *Per-layer*: K and V of
each layer have a plane of their own, ``[block][slot][kv head][dim]``, and a block has a piece in
every plane at the same offset. In both, the address of a block is linear in its id.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from kvcached.errors import InvalidInput

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1,
    "float8_e5m2": 1, "int8": 1, "uint8": 1,
}  # fmt: skip
LAYOUTS = ("cross_layer", "per_layer")
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""What ``layer_types`` of a Hugging Face configuration calls layers with a KV cache."""


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)`` for integers, b > 0."""
    return -(-a // b)


def _positive(name: str, value: object, *, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInput(f"{name} is {value!r}, but must be an integer >= {least}")


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What the KV cache of one model holds.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim:
        Of the layers that keep a KV cache. For MLA: 1 head of ``kv_lora_rank + rope_dim``.
    dtype:
        Of the stored keys and values: a name such as ``"bfloat16"``, or a torch dtype.
    block_size:
        Tokens per block.
    head_dim_v:
        Of the values; ``None`` means ``head_dim``, 0 means that there are no values of their own.
    mla_value_dim:
        For MLA: the values are the first this many elements of each key (``head_dim_v`` is 0).
    layout:
        ``"cross_layer"`` or ``"per_layer"``.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    block_size: int = 16
    head_dim_v: int | None = None
    mla_value_dim: int = 0
    layout: str = "cross_layer"

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            _positive(name, getattr(self, name))
        _positive("mla_value_dim", self.mla_value_dim, least=0)
        if self.head_dim_v is not None:
            _positive("head_dim_v", self.head_dim_v, least=0)
        name = str(self.dtype).removeprefix("torch.")
        if name not in DTYPE_BYTES:
            raise InvalidInput(
                f"dtype {self.dtype!r} is not known", hint=f"Known: {', '.join(DTYPE_BYTES)}."
            )
        object.__setattr__(self, "dtype", name)
        if self.layout not in LAYOUTS:
            raise InvalidInput(f"layout {self.layout!r} is not one of {LAYOUTS}")
        if self.mla_value_dim > self.head_dim or (self.mla_value_dim and self.value_dim):
            raise InvalidInput(
                f"mla_value_dim is {self.mla_value_dim}: it needs head_dim_v=0 and at most head_dim"
            )

    @property
    def value_dim(self) -> int:
        """Elements of one stored value vector (0: values are not stored apart)."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys of one block in one layer."""
        return self.block_size * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def value_bytes(self) -> int:
        """Bytes of the values of one block in one layer."""
        return self.block_size * self.num_kv_heads * self.value_dim * self.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, K and V."""
        return self.num_layers * (self.key_bytes + self.value_bytes)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers, K and V."""
        return self.block_bytes // self.block_size

    @classmethod
    def from_hf(cls, config: Any, **changes: Any) -> CacheSpec:
        """Read a Hugging Face model configuration (``AutoConfig`` object or a dict).

        Knows MHA, GQA, MQA and MLA (``kv_lora_rank``). ``changes`` override fields.
        Raises ``InvalidInput`` if the configuration names too little or nonsense, or has layers
        that keep something else than keys and values (then give ``num_layers``).
        """
        unknown = set(changes) - {field.name for field in fields(cls)}
        if unknown:
            raise InvalidInput(
                f"CacheSpec has no field {', '.join(sorted(unknown))}",
                hint=f"It has {', '.join(field.name for field in fields(cls))}.",
            )
        get = _reader(config)
        found = _mla(get) if get("kv_lora_rank") else _heads(get)
        if "num_layers" not in changes:
            found["num_layers"] = _layers(get)
        return cls(**({"dtype": str(get("dtype", "torch_dtype") or "bfloat16")} | found | changes))


def _layers(get: Any) -> int:
    layers, kinds = get("num_hidden_layers", "n_layer"), get("layer_types") or ()
    _positive("num_hidden_layers", layers)
    other = sorted({str(kind) for kind in kinds} - ATTENTION_LAYERS)
    if other:
        raise InvalidInput(
            f"layers of the kind {', '.join(other)} keep no keys and values",
            hint="Give the number of those that do: from_hf(config, num_layers=...).",
        )
    return int(layers)


def _mla(get: Any) -> dict[str, Any]:
    """Fields of a model that keeps one latent vector for all heads."""
    rank, rope = get("kv_lora_rank"), get("qk_rope_head_dim")
    _positive("kv_lora_rank", rank)
    rope = 0 if rope is None else rope
    _positive("qk_rope_head_dim", rope, least=0)
    return {"num_kv_heads": 1, "head_dim": rank + rope, "head_dim_v": 0, "mla_value_dim": rank}


def _heads(get: Any) -> dict[str, Any]:
    """Fields of a model whose query heads, or groups of them, have keys and values of their own."""
    heads, own = get("num_attention_heads", "n_head"), get("num_key_value_heads")
    if heads is None:
        raise InvalidInput(
            "the model configuration names no attention heads",
            hint="Pass model.config, AutoConfig.from_pretrained(...) or the dict of a config.json.",
        )
    _positive("num_attention_heads", heads)
    head_dim, hidden = get("head_dim"), get("hidden_size", "n_embd")
    if head_dim is None:
        _positive("hidden_size", hidden)
        head_dim = hidden // heads
    return {"num_kv_heads": heads if own is None else own, "head_dim": head_dim}


def _reader(config: Any) -> Any:
    """A function that returns the first of several names that ``config`` has, else None."""
    text = config.get("text_config") if isinstance(config, dict) else None
    if not isinstance(config, dict):
        get_text = getattr(config, "get_text_config", None)
        source = get_text() if callable(get_text) else config
    else:
        source = text or config

    def get(*names: str) -> Any:
        for name in names:
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if value is not None:
                return value
        return None

    return get


@dataclass(frozen=True, slots=True)
class Geometry:
    """How ``num_blocks`` blocks lie over pages of ``page_bytes``.

    ``block_bytes`` is the size of a block *in one plane*; a block is ``num_planes`` such pieces,
    one in each plane at the same offset. Plane ``p`` starts at byte ``p * plane_bytes`` of the
    reservation. Pages are numbered within a plane; page ``i`` stands for page ``i`` of all planes.
    """

    block_bytes: int
    num_planes: int
    num_blocks: int
    page_bytes: int
    num_pages: int = field(init=False, compare=False)
    """Pages of one plane."""
    page_group_bytes: int = field(init=False, compare=False)
    """Physical bytes behind one page index: a page in every plane."""

    def __post_init__(self) -> None:
        for name in ("block_bytes", "num_planes", "num_blocks", "page_bytes"):
            _positive(name, getattr(self, name))
        pages = cdiv(self.num_blocks * self.block_bytes, self.page_bytes)
        object.__setattr__(self, "num_pages", pages)  # frozen, and read at every growth
        object.__setattr__(self, "page_group_bytes", self.num_planes * self.page_bytes)

    @classmethod
    def of(cls, spec: CacheSpec, *, page_bytes: int, num_blocks: int) -> Geometry:
        """The geometry of ``spec``. Per-layer needs K and V of one size: views share strides."""
        if spec.layout == "cross_layer":
            return cls(spec.block_bytes, 1, num_blocks, page_bytes)
        if spec.value_bytes not in (0, spec.key_bytes):
            raise InvalidInput("layout='per_layer' needs keys and values of one size")
        planes = spec.num_layers * (2 if spec.value_bytes else 1)
        return cls(spec.key_bytes, planes, num_blocks, page_bytes)

    @property
    def plane_bytes(self) -> int:
        """Bytes of address space of one plane."""
        return self.num_pages * self.page_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes of address space of all planes."""
        return self.num_planes * self.plane_bytes

    def pages_of(self, block: int) -> range:
        """The pages that ``block`` touches."""
        start = block * self.block_bytes
        return range(start // self.page_bytes, cdiv(start + self.block_bytes, self.page_bytes))

    def blocks_touching(self, first_page: int, end_page: int) -> range:
        """The blocks that have a byte in pages ``[first_page, end_page)``."""
        start, end = first_page * self.page_bytes, end_page * self.page_bytes
        first = start // self.block_bytes
        return range(first, min(self.num_blocks, cdiv(end, self.block_bytes)))

    def blocks_inside(self, first_page: int, end_page: int) -> range:
        """The blocks that lie wholly in pages ``[first_page, end_page)``."""
        start, end = first_page * self.page_bytes, end_page * self.page_bytes
        first = cdiv(start, self.block_bytes)
        return range(first, max(first, min(self.num_blocks, end // self.block_bytes)))

    def packed_floor_bytes(self, num_blocks: int) -> int:
        """The fewest whole pages that could hold ``num_blocks`` blocks, in bytes of all planes."""
        return cdiv(num_blocks * self.block_bytes, self.page_bytes) * self.page_group_bytes
