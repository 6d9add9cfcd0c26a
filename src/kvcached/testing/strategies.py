"""Hypothesis strategies for caches. The only module here that needs hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from kvcached.layout import DTYPE_BYTES, LAYOUTS, CacheSpec
from kvcached.testing.models import model_specs


@st.composite  # type: ignore[untyped-decorator, unused-ignore]
def cache_specs(
    draw: st.DrawFn,
    *,
    max_layers: int = 5,
    max_heads: int = 4,
    max_head_dim: int = 80,
    dtypes: tuple[str, ...] = tuple(DTYPE_BYTES),
    layouts: tuple[str, ...] = LAYOUTS,
) -> CacheSpec:
    """Small caches of every kind: both layouts, all dtypes, odd sizes, MLA, unequal K and V."""
    layout = draw(st.sampled_from(layouts))
    head_dim = draw(st.integers(1, max_head_dim))
    kind = draw(st.sampled_from(("equal", "mla", "unequal")))
    head_dim_v, mla_value_dim = None, 0
    if kind == "mla":
        head_dim_v, mla_value_dim = 0, draw(st.integers(1, head_dim))
    elif kind == "unequal" and layout == "cross_layer":  # per-layer planes need equal sizes
        head_dim_v = draw(st.integers(1, max_head_dim))
    return CacheSpec(
        num_layers=draw(st.integers(1, max_layers)),
        num_kv_heads=1 if kind == "mla" else draw(st.integers(1, max_heads)),
        head_dim=head_dim,
        dtype=draw(st.sampled_from(dtypes)),
        block_size=draw(st.sampled_from((1, 2, 3, 16, 32, 64))),
        head_dim_v=head_dim_v,
        mla_value_dim=mla_value_dim,
        layout=layout,
    )


def real_specs() -> st.SearchStrategy[CacheSpec]:
    """The caches of real models, at block sizes 16, 32 and 64 and K/V of 1 and 2 bytes."""
    return st.builds(
        lambda name, dtype, size: model_specs(dtype=dtype, block_size=size)[name],
        st.sampled_from(sorted(model_specs())),
        st.sampled_from(("bfloat16", "float8_e4m3fn")),
        st.sampled_from((16, 32, 64)),
    )
