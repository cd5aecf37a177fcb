"""What a converted model is worth: language, recall, closeness to its softmax self, decoding.

Functions take any causal language model of transformers, converted or not, unless they say
otherwise, and return plain dataclasses (`dataclasses.asdict` makes them JSON).
`progress(done, total)` is called as the work goes on. docs/evaluate.md says what each is for.
"""

from __future__ import annotations

from ._models import Progress, summed_loss
from .attention import AttentionMap, LayerError, attention_errors, attention_maps
from .decoding import DecodePoint, Generation, cache_bytes, decode_speed, generate
from .fidelity import Agreement, agreement
from .harness import lm_eval
from .language import (
    Perplexity,
    PositionalPerplexity,
    PositionBin,
    gap_closed,
    perplexity,
    perplexity_by_position,
)
from .recall import (
    TASKS,
    Recall,
    associative_recall,
    copy_recall,
    pass_key_recall,
    recall_curve,
)

__all__ = [
    "TASKS",
    "Agreement",
    "AttentionMap",
    "DecodePoint",
    "Generation",
    "LayerError",
    "Perplexity",
    "PositionBin",
    "PositionalPerplexity",
    "Progress",
    "Recall",
    "agreement",
    "associative_recall",
    "attention_errors",
    "attention_maps",
    "cache_bytes",
    "copy_recall",
    "decode_speed",
    "gap_closed",
    "generate",
    "lm_eval",
    "pass_key_recall",
    "perplexity",
    "perplexity_by_position",
    "recall_curve",
    "summed_loss",
]
