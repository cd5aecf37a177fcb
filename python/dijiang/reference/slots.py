"""The hard keys of a state, token by token."""

from __future__ import annotations

import torch

from .far_state import LOG2E, decay_far, fold_exponent
from .features import log_features
from .hard_keys import CARRIED, best_of, novelty_of


class HardKeySlots:
    """The slots of one sequence, for all kv heads: they fill up alike and hold different keys."""

    def __init__(self, state, n, window, cache_size):
        self.window, self.size = window, cache_size
        count = int((state.cache_position[n, 0] >= 0).sum())
        self.keys = list(state.cache_k[n, :, :count].unbind(1))
        self.values = list(state.cache_v[n, :, :count].unbind(1))
        self.position = state.cache_position[n, :, :count].clone()
        self.sums = state.cache_sums[n].clone()
        votes = state.cache_votes[n]
        self.votes = torch.cat([votes[:, :count], votes[:, cache_size:]], 1)
        self.since = torch.zeros_like(self.votes[:, :count])
        if state.cache_decay is not None:
            self.since = state.cache_decay[n, :, :count].clone()

    @torch.no_grad()
    def see(self, token, scores, p, sinks):
        """Token p (key and value); scores of the sinks, the slots and the rest of the window."""
        self.sums = self.sums + token
        before = max(0, (p // self.window - 1) * self.window)  # the first of the block before
        if p < self.window:
            return
        weights = torch.softmax(scores / LOG2E, -1).sum(1)
        first, slots = min(sinks, p + 1), len(self.keys)
        skipped = min(max(sinks - before, 0), self.window)
        window = weights[:, first + slots : first + slots + self.window - skipped]
        window = torch.nn.functional.pad(window, (skipped, 0))
        self.votes = self.votes + torch.cat([weights[:, first : first + slots], window], 1)

    def turn_over(self, far, p, slots_k, slots_v, slots_decay, fk, scale, sinks, given=None):
        """Before token p: block p / w - 2 leaves the window. Returns the far state after it."""
        w, acc = self.window, far[0].dtype
        start = p - 2 * w
        fresh = [s for s in range(start, start + w) if s >= sinks]
        at = lambda slots: [slots[s % (2 * w)] for s in range(start, start + w)]  # noqa: E731
        since = torch.zeros(len(self.since), w, dtype=acc, device=self.since.device)
        if slots_decay:
            decay = torch.stack(at(slots_decay), 1)
            far = decay_far(far, decay.sum(1))
            since = decay.flip(1).cumsum(1).flip(1) - decay
            self.since = self.since + decay.sum(1, keepdim=True)
        skip = w - len(fresh)
        if not fresh and not self.keys:
            self.votes = torch.zeros_like(self.votes)
            return far
        keys = torch.stack(self.keys + at(slots_k)[skip:], 1)
        values = torch.stack(self.values + at(slots_v)[skip:], 1)
        since = torch.cat([self.since, since[:, skip:]], 1)
        position = torch.tensor(fresh, dtype=torch.int64).expand(len(keys), -1)
        position = torch.cat([self.position, position.to(self.position)], 1)
        num_slots = len(self.keys)  # the candidates' votes
        votes = torch.cat([self.votes[:, :num_slots], self.votes[:, num_slots + skip :]], 1)
        if given is None:
            stay = self._choose(keys, values, votes, p)
        else:
            stay = self._take(position, given)
        gone = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        leave = gone.scatter_(1, stay, False).nonzero()[:, 1].reshape(len(keys), -1)
        take = lambda x, i: x.gather(1, i.reshape(*i.shape, *(1,) * (x.dim() - 2)).expand(  # noqa: E731
            *i.shape, *x.shape[2:]))  # fmt: skip
        for key, value, log_decay in zip(
            take(keys, leave).unbind(1), take(values, leave).unbind(1),
            take(since, leave).unbind(1), strict=True,
        ):  # fmt: skip
            exponent = far[1][..., :0]
            if fk is not None:
                exponent = log_features(key[:, None].to(acc), fk, scale)[:, 0]
                exponent = LOG2E * (exponent + log_decay[:, None])
            far = fold_exponent(far, exponent, value, None, is_sink=False)
        self.keys, self.values = (
            list(take(keys, stay).unbind(1)),
            list(take(values, stay).unbind(1)),
        )
        self.since, self.position = take(since, stay), take(position, stay)
        self.votes = torch.nn.functional.pad(CARRIED * take(votes, stay), (0, w))
        return far

    def _choose(self, keys, values, votes, tokens):
        """Indices of the candidates (Hkv, n) that stay, by slot."""
        num_slots, n = len(self.keys), keys.shape[1]
        stay = []
        for head in range(len(keys)):
            kept = set(range(n))
            if n > self.size:
                head_keys, head_values = (x[head].detach().to(self.sums) for x in (keys, values))
                key_sum, value_sum = self.sums[head].split([keys.shape[2], values.shape[2]])
                novelty = novelty_of(head_keys, head_values, key_sum, value_sum / tokens)
                kept = set(best_of(novelty, votes[head], self.size))
            entering = [i for i in range(num_slots, n) if i in kept]
            slots = [i if i in kept else entering.pop(0) for i in range(num_slots)
                     if i in kept or entering]  # fmt: skip
            stay.append(slots + entering)
        return torch.tensor(stay, dtype=torch.int64, device=keys.device)

    @staticmethod
    def _take(position, given):
        """As _choose, of the positions in a table's row."""
        given = given[:, : int((given[0] >= 0).sum())].long()
        return (position[:, None, :] == given[:, :, None]).int().argmax(-1)

    def padded(self, x, value=0):
        """(Hkv, slots filled) -> (Hkv, slots)."""
        return torch.nn.functional.pad(x, (0, self.size - len(self.keys)), value=value)

    def state(self, state, n):
        count = len(self.keys)
        rows = lambda x, old: torch.cat([torch.stack(x, 1), old[n, :, count:]], 1) if x else old[n]  # noqa: E731
        votes = torch.cat([self.padded(self.votes[:, :count]), self.votes[:, count:]], 1)
        decay = None if state.cache_decay is None else self.padded(self.since)
        return (
            rows(self.keys, state.cache_k), rows(self.values, state.cache_v),
            self.padded(self.position, -1), decay, votes, self.sums,
        )  # fmt: skip
