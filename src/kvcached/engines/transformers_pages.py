"""The attention function ``"kvcached"`` of transformers, and what its cache classes share.

Importing this module registers the function. How the parts meet: a model's attention layer first
calls ``past_key_values.update(key, value, layer)`` and hands what that returns, unchanged, to the
attention function. Our ``update`` returns the same new key and value with a *ticket* attached that
names the cache and the layer. The attention function writes them into the pages of that layer and
attends over the block table. A key without a ticket (training, no cache, a stock cache) goes to
transformers' own SDPA.

``PackedCache`` is for engines of one's own: one row of tokens of many sequences, packed.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcached.engines.transformers_batch import PackedBatch
from kvcached.engines.transformers_calls import LayerCache, LayerCalls
from kvcached.errors import EngineUnsupported, InvalidInput

if TYPE_CHECKING:
    from kvcached.cache import KVCache

NAME = "kvcached"
_TICKET = "_kvcached_ticket"
_LAYER_KINDS = {"full_attention", "sliding_attention"}


class _ElasticLength(int):
    """A key length that tells our mask function that the keys lie in elastic pages."""


@dataclass(frozen=True, slots=True)
class _Ticket:
    owner: PagedCache
    layer: int


class _Expecting(threading.local):
    """The cache that handed out the last ticket of this thread, until it comes back."""

    owner: weakref.ref[PagedCache] | None = None


_expecting = _Expecting()


# --- the attention function and its mask ----------------------------------------------------


def elastic_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function ``"kvcached"``, called by every attention layer.

    ``query [B, Hq, Q, D]``, ``key`` and ``value [B, Hkv, Q, D]``: the new tokens only, if they
    carry a ticket. ``attention_mask``: bool ``[B, tokens so far]`` or ``None`` with a ticket.
    Returns ``[B, Q, Hq, Dv]`` and ``None``; rows of padding are zero. No gradient flows through
    elastic pages. Raises ``EngineUnsupported`` naming the feature it cannot do.
    """
    ticket: _Ticket | None = getattr(key, _TICKET, None)
    if ticket is None:
        _check_nothing_is_lost(module)
        _refuse(softcap=softcap, s_aux=s_aux)  # SDPA would leave these out without a word
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout,
                                        scaling=scaling, is_causal=is_causal, **kwargs)  # fmt: skip
        return out, None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(
        dropout=dropout,
        bidirectional_attention=not causal,
        output_attentions=kwargs.get("output_attentions"),
        position_bias=kwargs.get("position_bias"),
    )
    features = {
        "softmax_scale": scaling, "softcap": softcap or 0.0,
        "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
    }  # fmt: skip
    sinks = None if s_aux is None else s_aux.detach().float()
    out = ticket.owner.attend(ticket.layer, query, key, value, attention_mask, sinks, features)
    return out, None


def _check_nothing_is_lost(module: torch.nn.Module) -> None:
    """Raise if this model got a ticket just now, and changed the key that carried it."""
    owner = _expecting.owner() if _expecting.owner is not None else None
    if owner is not None and owner.config is getattr(module, "config", None):
        _expecting.owner = None
        raise EngineUnsupported(
            f"{type(module).__name__} changes keys between the cache and the attention function",
            hint="Use transformers' own cache: leave out past_key_values.",
        )


def _refuse(**features: Any) -> None:
    """Raise if a feature is asked for: any value but ``None``, ``False`` and 0."""
    for name, value in features.items():
        if isinstance(value, torch.Tensor) or value:
            raise EngineUnsupported(
                f"attn_implementation='kvcached' cannot do {name.replace('_', ' ')}",
                hint="Load the model with attn_implementation='eager' for it.",
            )


def elastic_mask(
    *args: Any,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function that belongs to ``"kvcached"``.

    For elastic pages the mask stays as the user gave it, bool ``[B, tokens]``: pads only say which
    tokens take no slot. For everything else it is the mask that SDPA needs.
    """
    if not isinstance(kv_length, _ElasticLength):
        mask: torch.Tensor | None = sdpa_mask(
            *args, kv_length=kv_length, attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip, **kwargs,
        )  # fmt: skip
        return mask
    plain = allow_is_causal_skip and not kwargs.get("use_vmap")
    bidirectional = "allow_is_bidirectional_skip" in kwargs
    _refuse(masks_other_than_causal_and_sliding=not plain or bidirectional)
    return attention_mask


AttentionInterface.register(NAME, elastic_attention)
AttentionMaskInterface.register(NAME, elastic_mask)


# --- caches -----------------------------------------------------------------------------------


class _ElasticLayer(CacheLayerMixin):
    """One layer of a paged cache, as transformers' ``Cache`` wants to see it."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False
    is_sliding = False  # every token is kept; a window only bounds what is read

    def __init__(self, owner: PagedCache, layer: int) -> None:
        super().__init__()
        self._owner, self._layer = owner, layer
        self._ticket = _Ticket(owner, layer)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: pages appear when tokens come."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attach the ticket for the attention function; nothing is written yet."""
        self._owner.expect(self._layer, key_states, value_states)
        setattr(key_states, _TICKET, self._ticket)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included."""
        return self._owner.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the mask must cover."""
        return _ElasticLength(self._owner.columns + query_length), 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """The owner resets all layers at once."""


class PagedCache(Cache):
    """What the two caches share: tickets, views, and the attention over one ``PackedBatch``."""

    def __init__(self, config: Any) -> None:
        config = config.get_text_config(decoder=True)
        _check_config(config)
        self.config = config
        self._cache: KVCache | None = None
        self._views: list[LayerCache] = []
        self._batch: PackedBatch | None = None
        self.columns = 0
        self._pending: int | None = None
        self._self = weakref.ref(self)
        self._calls, self._lasting = LayerCalls(), LayerCalls()
        self._stream: Any = None
        super().__init__(layers=[_ElasticLayer(self, i) for i in range(config.num_hidden_layers)])

    def _bind(self, cache: KVCache) -> None:
        layers = cache.spec.num_layers
        if layers != len(self.layers):
            raise InvalidInput(f"the KVCache has {layers} layers, the model {len(self.layers)}")
        self._cache = cache
        self._views = [LayerCache(*cache.layer(i)) for i in range(layers)]

    def expect(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """A layer is about to attend: check that the one before it really came back to us."""
        attention = self.config._attn_implementation  # noqa: SLF001 - it has no public name
        if self._pending is not None or attention != NAME:
            raise EngineUnsupported(
                f"the model's attention ({attention!r}) does not read elastic pages",
                hint="Load the model with attn_implementation='kvcached'.",
            )
        if layer == 0:
            self._start(key, value)
        self._pending = layer
        _expecting.owner = self._self

    def _start(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """A forward pass begins with these keys and values ``[B, Hkv, Q, D]`` of layer 0."""
        raise NotImplementedError

    def _plan(self, mask: torch.Tensor | None) -> PackedBatch:
        """The batch of the forward pass that began, made when layer 0 attends."""
        raise NotImplementedError

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor | None, sinks: torch.Tensor | None, features: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        """Write the new tokens of one layer and attend over all, as ``elastic_attention`` says."""
        self._pending = _expecting.owner = None
        self._check_place(layer, key)
        if layer == 0:
            self._batch = None
            self._begin(self._plan(mask))
        batch = self._batch
        if batch is None:
            raise EngineUnsupported("a layer attends before layer 0 of the same forward pass did")
        return self._calls.run(query, key, value, self._views[layer], batch, sinks, features)

    def _begin(self, batch: PackedBatch) -> None:
        """All layers attend to ``batch``. What calls of even batches need serves later ones too."""
        self._batch = batch
        stream = None
        if batch.slot_mapping.is_cuda:
            stream = torch.cuda.current_stream(batch.slot_mapping.device)
        if stream != self._stream:  # parts of sequences of two streams need memory apart
            self._stream, self._lasting = stream, LayerCalls()
        self._calls = self._lasting if batch.cu_seqlens_q is None else LayerCalls()

    def _check_place(self, layer: int, key: torch.Tensor) -> None:
        held = self._views[layer].keys
        if (key.dtype, key.device) != (held.dtype, held.device):
            raise EngineUnsupported(
                f"layer {layer} computes in {_short(key.dtype)} on {key.device}, but the cache "
                f"holds {_short(held.dtype)} on {held.device}",
                hint="A cache has one dtype and one device, so the model must have, too; without "
                "dtype= and device= an ElasticCache takes those of the model.",
            )

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002 - their name
        """No maximum."""
        return -1

    def update_conv_state(self, *_: Any, **__: Any) -> Any:
        """Linear attention keeps no KV cache; refused."""
        raise EngineUnsupported("linear attention layers cannot lie in elastic pages")

    update_recurrent_state = update_indexer = update_conv_state

    def crop(self, tokens_to_remove: int) -> None:
        """Only a crop of nothing is possible (assisted generation needs more; refused)."""
        if tokens_to_remove:
            raise EngineUnsupported("an elastic cache cannot be cropped (assisted generation)")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_config(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYER_KINDS
    if getattr(config, "attention_chunk_size", None):
        kinds.add("chunked_attention")
    if getattr(config, "kv_lora_rank", None):
        kinds.add("multi-head latent attention")
    if getattr(config, "num_kv_shared_layers", 0):
        kinds.add("layers that share keys and values")
    if kinds:
        raise EngineUnsupported(
            f"{config.model_type} has {', '.join(sorted(kinds))}, which elastic pages do not hold",
            hint="Use transformers' own cache: leave out past_key_values.",
        )


def cache_argument(model: torch.nn.Module) -> str:
    """As what ``model.forward`` takes a cache.

    Newer releases call it ``cache``, and warn of the older name, ``past_key_values``.
    """
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


class PackedCache(PagedCache):
    """The elastic pages of a ``KVCache``, for an engine's own packed forward pass.

    The engine extends its sequences, then::

        paged = PackedCache(model.config, cache)
        paged.batch = PackedBatch.of(cache, [(sequence, slots), ...])
        model(input_ids=ids, position_ids=positions, **{cache_argument(model): paged})

    with ``ids`` and ``positions`` ``[1, T]``.

    Parameters
    ----------
    config:
        The model's configuration.
    cache:
        Stays the caller's, who closes it.
    """

    def __init__(self, config: Any, cache: KVCache) -> None:
        super().__init__(config)
        self._bind(cache)
        self.batch: PackedBatch | None = None

    def _start(self, key: torch.Tensor, *_: torch.Tensor) -> None:
        tokens = 0 if self.batch is None else len(self.batch.slot_mapping)
        if key.shape[0] * key.shape[2] != tokens:
            raise InvalidInput(
                f"the forward pass has {key.shape[0] * key.shape[2]} tokens, the batch {tokens}",
                hint="Set .batch before each forward pass.",
            )

    def _plan(self, mask: torch.Tensor | None) -> PackedBatch:
        _refuse(an_attention_mask_over_packed_tokens=mask)
        batch, self.batch = self.batch, None
        assert batch is not None, "checked when the pass began"
        return batch
