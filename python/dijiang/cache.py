"""A cache for generate() whose size does not depend on the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ._types import AttentionState
from .config import DiJiangConfig


class DiJiangLayer(CacheLayerMixin):
    """One converted layer's memory: an AttentionState once the first tokens were seen.

    ``update`` hands keys and values straight back; the attention function, which needs queries
    too, replaces ``state`` through :meth:`advance`.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.state: AttentionState | None = None
        self.seen = 0  # tokens, padding included

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the attention function makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        return key_states, value_states

    def advance(self, state: AttentionState, num_tokens: int) -> None:
        """The state after num_tokens more tokens."""
        self.state = state
        self.seen += num_tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.11

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """(length of the context with the query, 0); ``query``: its length, once its positions."""
        return self.seen + (len(query) if isinstance(query, Tensor) else query), 0

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        """Nothing to gain: the state is small and needed at every token."""

    def prefetch(self) -> None:
        """See offload."""

    def _map(self, function) -> None:
        if self.state is not None:
            self.state = AttentionState(*(None if x is None else function(x) for x in self.state))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                "DiJiangCache.crop: a token folded into the state cannot be taken out again. "
                "Keep a copy.deepcopy of the cache from before these tokens, or start a new one"
            )

    def activate_past_recording(self) -> None:
        raise NotImplementedError(
            "DiJiangCache: assisted (speculative) decoding takes rejected tokens back, which a "
            "state that folds tokens together cannot do. Generate without assistant_model and "
            "prompt_lookup_num_tokens"
        )


class DiJiangCache(Cache):
    """A converted model's cache: constant-size states, and softmax layers' growing keys.

    ``generate()`` and ``model(ids, use_cache=True)`` make it by themselves. Layers which the
    config's ``layers`` leaves out keep an ordinary growing cache.

    Args:
        config: the converted model's config (``model.config``).

    >>> cache = DiJiangCache(model.config)                                      # doctest: +SKIP
    >>> model(ids, past_key_values=cache).past_key_values.get_seq_length()      # doctest: +SKIP
    """

    def __init__(self, config):
        values = getattr(config, "dijiang", None)
        if values is None:
            raise ValueError(
                "DiJiangCache: this config is not a converted model's. Call dijiang.convert(model) "
                "first and give model.config"
            )
        self.config = dijiang = DiJiangConfig.from_dict(values)
        super().__init__(
            layers=[
                DiJiangLayer() if dijiang.converts(i) else DynamicLayer()
                for i in range(config.num_hidden_layers)
            ]
        )

    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        total = 0
        for layer in self.layers:
            tensors = layer.state or () if isinstance(layer, DiJiangLayer) else ()
            for x in (*tensors, layer.keys, layer.values):
                if isinstance(x, torch.Tensor):
                    total += x.numel() * x.element_size()
        return total

    def activate_past_recording(self) -> None:
        for layer in self.layers:
            if isinstance(layer, DiJiangLayer):
                layer.activate_past_recording()
