"""What the machine could do at best: the floor that the time of attention is compared with.

Its speed at a large matrix product and at a plain copy is measured in turns with the attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

CHUNK = 64

PRODUCT = "torch.mm, 10^9 multiply-adds/s"
COPY = "copy, 10^9 bytes/s"
LIMITS = (PRODUCT, COPY)


@dataclass(frozen=True)
class Shape:
    """One attention layer: `features` is m, the length of a feature vector."""

    heads: int
    kv_heads: int
    headdim: int
    features: int
    headdim_v: int


@dataclass(frozen=True)
class Limit:
    """A call that the machine does as fast as it can, and the work in it."""

    call: Callable[[], object]
    work: int  # multiply-adds, or bytes read and written


def multiply_adds(tokens: int, shape: Shape, chunk: int = CHUNK) -> int:
    """Multiply-adds that the forward of linear attention needs, taken in chunks of `chunk` tokens.

    With d the head dimension, m features and values of dv, a token costs

    - a query head: m d for its features, chunk (m + dv) / 2 for the weights and values of its own
      chunk, of whose keys half are in the future, and m dv to read the state of all before;
    - a key/value head: m d for its features and m dv to add it to the state.

    Exponentials, maxima and denominators are not counted.
    """
    d, m, dv = shape.headdim, shape.features, shape.headdim_v
    query = m * d + chunk * (m + dv) // 2 + m * dv
    key = m * d + m * dv
    return tokens * (shape.heads * query + shape.kv_heads * key)


def least_bytes(tokens: int, shape: Shape, size: int = 4) -> int:
    """Bytes to read q, k and v once and to write the output once, numbers of `size` bytes."""
    query = shape.heads * (shape.headdim + shape.headdim_v)
    key = shape.kv_heads * (shape.headdim + shape.headdim_v)
    return tokens * (query + key) * size


def seconds(tokens: int, shape: Shape, product_rate: float, copy_rate: float) -> float:
    """The least time of a float32 forward: that of its products or, if longer, of its traffic.

    product_rate: multiply-adds a second; copy_rate: bytes a second, read and written.
    """
    return max(multiply_adds(tokens, shape) / product_rate, least_bytes(tokens, shape) / copy_rate)


def limits(size: int = 1024, numbers: int = 2**24) -> dict[str, Limit]:
    """A matrix product of size x size x size and a copy of `numbers`, both float32."""
    a, b, product = torch.randn(3, size, size)
    source = torch.randn(numbers)
    target = torch.empty_like(source)
    return {
        PRODUCT: Limit(lambda: torch.mm(a, b, out=product), size**3),
        COPY: Limit(lambda: target.copy_(source), 2 * 4 * numbers),
    }
