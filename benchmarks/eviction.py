"""A rival at equal memory: keys kept by accumulated attention (H2O, arXiv 2306.14048).

Window and sinks as ours; the other slots go to the keys of most attention mass since they came. No
far keys. The choice is made in plain PyTorch, attention runs on our operator by its table of hard
keys, so that nothing differs but which keys are kept.
"""

from __future__ import annotations

import torch
from dijiang import ops
from dijiang.modules import AttentionKernel, kernels_of
from torch import Tensor


class HeavyHitters(AttentionKernel):
    """An AttentionKernel that keeps cache_size heavy hitters; whole sequences alone."""

    def forward(self, q, k, v, *, hidden=None, **layout):
        if any(x is not None for x in layout.values()):
            raise NotImplementedError("HeavyHitters takes whole, unpadded sequences")
        c = self.config
        tables = [self._table(*row) for row in zip(q, k, strict=True)]
        out = [
            ops.kernelized_attention(
                q[b : b + 1], k[b : b + 1], v[b : b + 1], scale=self.scale, window=c.window,
                sinks=c.sinks, cache_size=c.cache_size, hard_keys=table,
            )
            for b, table in enumerate(tables)
        ]  # fmt: skip
        return torch.cat(out)

    @torch.no_grad()
    def _table(self, q: Tensor, k: Tensor) -> Tensor:
        """One sequence, q (heads, T, d), k (kv_heads, T, d) -> (kv_heads, rows, cache_size)."""
        w, sinks, size = self.config.window, self.config.sinks, self.config.cache_size
        heads, T, _ = k.shape
        q = q.unflatten(0, (heads, -1))
        table = torch.full((heads, T // w + 2, size), -1, dtype=torch.int32)
        mass = torch.zeros(heads, T)
        held = torch.zeros(heads, 0, dtype=torch.int64)
        for block in range(1, -(-T // w)):
            # Mass that the queries of the block before give their exact keys.
            begin, end = (block - 1) * w, block * w
            first = torch.arange(min(sinks, max(begin - w, 0)))
            near = torch.arange(max(begin - w, 0), end)
            exact = torch.cat([first.expand(heads, -1), held, near.expand(heads, -1)], 1)
            keys = k.gather(1, exact[..., None].expand(-1, -1, k.shape[2]))
            scores = self.scale * (q[:, :, begin:end] @ keys[:, None].mT)
            later = exact[:, None, None] > torch.arange(begin, end)[:, None]
            weights = scores.masked_fill(later, -torch.inf).softmax(-1).sum((1, 2))
            mass.scatter_add_(1, exact, weights)
            if block < 2:
                continue
            fresh = torch.arange(max(begin - w, sinks), begin)
            all_ = torch.cat([held, fresh.expand(heads, -1)], 1)
            best = mass.gather(1, all_).topk(min(size, all_.shape[1])).indices
            held = all_.gather(1, best.sort(1).values)
            table[:, block] = self._slots(table[:, block - 1], held)
        return table

    @staticmethod
    def _slots(before: Tensor, held: Tensor) -> Tensor:
        """Keys that stay keep their slots, others go where there is room."""
        rows = []
        for slots, keys in zip(before.tolist(), held.tolist(), strict=True):
            stay, known = set(keys), set(slots)
            entering = [key for key in keys if key not in known]
            row = [s if s in stay else entering.pop(0) if entering else -1 for s in slots]
            rows.append(row)
        return torch.tensor(rows, dtype=torch.int32)


def keep_heavy_hitters(model):
    """Makes the hard keys of a converted model heavy hitters, in place."""
    for kernel in kernels_of(model):
        kernel.__class__ = HeavyHitters
    return model
