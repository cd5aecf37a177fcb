"""What a model is converted to: one dataclass, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ._types import cache_sizes

FEATURE_MAPS = (
    "prf", "pff", "wpff", "wdcf", "wdcf_pm", "learned", "learned_pm", "learned_softmax", "softmax",
    "elu",
)  # fmt: skip
_CHOICES = {
    "feature_map": (None, *FEATURE_MAPS),
    "radius": ("normal", "chi"),
    "sampling": ("stratified", "iid"),
    "init": ("identity", "dct"),
    "decay": (None, "head", "token", "position"),
}


@dataclass(frozen=True)
class DiJiangConfig:
    """How attention is kernelised: ``o_t = sum_s w_ts v_s / sum_s w_ts``.

    Exact keys (the first ``sinks`` tokens of a sequence, the query's block of ``window`` tokens and
    the block before it, and ``cache_size`` keys chosen from those before) weigh ``exp(q.k scale)``;
    all others weigh ``phi(q).phi(k)``. The bare
    defaults are the best found by measurement; :meth:`paper` is the method as its paper has it
    (arXiv 2403.19928, eq. 9, 10, 12) and :meth:`published` as its published code has it.

    Raises ValueError (TypeError for a wrong type), naming the field, what it may be and what it is.

    >>> DiJiangConfig(window=128).window
    128
    >>> DiJiangConfig.paper().feature_map
    'wdcf'
    """

    #: ``prf``, ``pff``, ``wpff``, ``wdcf``, ``wdcf_pm``, ``learned``, ``learned_pm``,
    #: ``learned_softmax``, ``softmax``, ``elu`` (see FeatureMap); None: no far keys at all, window
    #: and sinks alone.
    feature_map: str | None = "learned_pm"
    #: Features a head. None: as many as the head has dimensions.
    num_features: int | None = None
    #: Distribution of the frequencies t: ``normal``, as in the paper, or ``chi``, for which the
    #: estimate of exp(q.k) has no bias when directions are uniform.
    radius: str = "normal"
    #: Random signs before the DCT: its rows then spread as uniform directions do.
    random_signs: bool = False
    #: ``stratified``: u = (permutation + 1/2) / m; ``iid``: independent uniform u; t = F^-1(u).
    sampling: str = "stratified"
    #: What ``learned`` maps start from: ``identity`` or ``dct`` (with the frequencies t).
    init: str = "identity"
    #: Coefficient of -|x|^2 in log phi at the start. "auto": 1/2, the unbiased estimator, for
    #: ``prf`` and ``pff``, else 0 (eq. 12).
    beta: float | str = "auto"
    #: Queries and keys use one set of features. Otherwise they start equal and learn apart.
    share_qk: bool = False
    window: int = 64
    sinks: int = 4
    #: Hard keys: how many of those that leave the window stay exact, a kv head, chosen anew at
    #: every block (docs/numerics.md). None: as many as the window has. A tuple: of each kv head,
    #: which is for single layers in the first place (per_layer, below).
    cache_size: int | tuple[int, ...] | None = None
    #: Log-weight of the far keys at the start. "auto": 0 without near keys; with them closed (the
    #: far keys weigh nothing) until calibrated on text. See convert.
    gate: float | str = "auto"
    #: Forgetting of far keys: None, "head" (a constant a head), "token" (computed from the hidden
    #: state, a token and head). It starts as RetNet's: from head to head 1/32 to 1/512 is lost, a
    #: token without a window, a window's length with one. "position": the published code's, a
    #: weight of each of ``num_positions`` positions as query and one as key, their product in the
    #: place of the decay; needs ``normalize=False`` and no near keys.
    decay: str | None = None
    num_positions: int | None = None
    #: Divide by the sum of weights. False is the paper's eq. 13.
    normalize: bool = True
    #: Group norm over the heads' outputs, then times silu(hidden W): what the published code puts
    #: in the place of the denominator.
    group_norm: bool = False
    output_gate: bool = False
    #: "all" or the indices of the layers to convert; the others keep softmax and a growing cache.
    layers: str | tuple[int, ...] = "all"
    #: What single layers have otherwise, by layer: {0: {"cache_size": (256, 16)}}. Any field but
    #: layers, per_layer and seed; see spread_hard_keys, which finds cache sizes.
    per_layer: Mapping[int, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    #: Of everything random: permutations, signs, directions.
    seed: int = 0

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"DiJiangConfig: {name} must be one of {_listed(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        for name in ("random_signs", "share_qk", "normalize", "group_norm", "output_gate"):
            _check_type(name, getattr(self, name), bool)
        if self.cache_size is None:
            object.__setattr__(self, "cache_size", self.window)
        for name in ("window", "sinks", "seed"):
            _check_int(name, getattr(self, name), 0)
        object.__setattr__(self, "cache_size", _checked_sizes(self.cache_size))
        for name in ("num_features", "num_positions"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        for name in ("beta", "gate"):
            value = getattr(self, name)
            if value != "auto":
                if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
                    raise TypeError(
                        f"DiJiangConfig: {name} must be 'auto' or a number, got {value!r}"
                    )
                object.__setattr__(self, name, float(value))
        self._check_layers()
        if self.cache_size and not self.window:
            raise ValueError(
                f"DiJiangConfig: cache_size={self.cache_size} is of keys that leave a window, and "
                "window is 0. Give a window, or cache_size=0"
            )
        if (self.decay == "position") != (self.num_positions is not None):
            raise ValueError(
                "DiJiangConfig: decay='position' and num_positions go together, got "
                f"decay={self.decay!r} and num_positions={self.num_positions!r}"
            )
        if self.decay == "position" and (self.has_near or self.normalize):
            raise ValueError(
                "DiJiangConfig: decay='position' needs window=0, sinks=0 and normalize=False, got "
                f"{self.window}, {self.sinks} and {self.normalize}"
            )
        if self.feature_map is None:
            if not self.window and not self.sinks:
                raise ValueError(
                    "DiJiangConfig: feature_map=None leaves no key at all without a window or "
                    "sinks. Give window=64, or a feature_map"
                )
            for name in ("decay", "num_features"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"DiJiangConfig: {name}={getattr(self, name)!r} is about far keys, and "
                        "feature_map=None has none"
                    )
        if self.feature_map in ("wdcf_pm", "learned_pm") and (self.num_features or 0) % 2:
            raise ValueError(
                f"DiJiangConfig: {self.feature_map} has features in pairs of +x and -x: "
                f"num_features must be even, got {self.num_features}"
            )
        self._check_per_layer()

    def _check_layers(self):
        if self.layers == "all":
            return
        if isinstance(self.layers, (str, bytes)) or not hasattr(self.layers, "__iter__"):
            raise ValueError(
                f"DiJiangConfig: layers must be 'all' or a list of layer indices, "
                f"got {self.layers!r}"
            )
        layers = tuple(self.layers)
        for layer in layers:
            _check_int("layers", layer, 0)
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(
                f"DiJiangConfig: layers must name each layer once and at least one, got {layers}"
            )
        object.__setattr__(self, "layers", tuple(sorted(layers)))

    def _check_per_layer(self):
        if not isinstance(self.per_layer, Mapping):
            raise TypeError(
                "DiJiangConfig: per_layer must be a dict of dicts, {layer: {field: value}}, got "
                f"{self.per_layer!r}"
            )
        checked = {}
        for layer, changes in self.per_layer.items():
            # Keys of a JSON object are strings.
            layer = int(layer) if isinstance(layer, str) and layer.isdecimal() else layer
            _check_int("layers of per_layer", layer, 0)
            if not self.converts(layer):
                raise ValueError(
                    f"DiJiangConfig: per_layer[{layer}] is of a layer that layers leaves as it is"
                )
            if not isinstance(changes, Mapping):
                raise TypeError(
                    f"DiJiangConfig: per_layer[{layer}] must be a dict, got {changes!r}"
                )
            unknown = sorted(set(changes) - _OF_A_LAYER)
            if unknown:
                raise ValueError(
                    f"DiJiangConfig: per_layer[{layer}] cannot have {_listed(unknown)}, only "
                    f"{_listed(sorted(_OF_A_LAYER))}"
                )
            checked[layer] = dict(changes)
        object.__setattr__(self, "per_layer", dict(sorted(checked.items())))
        for layer in checked:
            try:
                own = self.at(layer)
            except (ValueError, TypeError) as error:
                said = str(error).removeprefix("DiJiangConfig: ")
                raise type(error)(f"DiJiangConfig: per_layer[{layer}]: {said}") from None
            if "cache_size" in checked[layer]:  # a tuple may have come as a list, from JSON
                checked[layer]["cache_size"] = own.cache_size

    def at(self, layer: int) -> DiJiangConfig:
        """What this layer has.

        >>> DiJiangConfig(per_layer={3: {"cache_size": 256}}).at(3).cache_size
        256
        """
        if not self.per_layer:
            return self
        return self.replace(per_layer={}, **self.per_layer.get(layer, {}))

    @classmethod
    def paper(cls, **overrides) -> DiJiangConfig:
        """The method as written: weighted DCT features alone, every key far (eq. 9, 10, 12)."""
        settings = dict(
            feature_map="wdcf", share_qk=True, window=0, sinks=0, cache_size=0, beta=0.0
        )
        return cls(**(settings | overrides))

    @classmethod
    def published(cls, **overrides) -> DiJiangConfig:
        """The published code's: softmax features, decay a head, group norm and a SiLU gate."""
        settings = dict(
            feature_map="softmax", sampling="iid", share_qk=True, window=0, sinks=0, cache_size=0,
            decay="head", normalize=False, group_norm=True, output_gate=True,
        )  # fmt: skip
        return cls(**(settings | overrides))

    @classmethod
    def window_only(cls, window: int = 64, sinks: int = 4, **overrides) -> DiJiangConfig:
        """The training-free model to compare with: window and sinks, and no other key."""
        settings = dict(feature_map=None, window=window, sinks=sinks, cache_size=0)
        return cls(**(settings | overrides))

    def replace(self, **changes) -> DiJiangConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    @property
    def has_near(self) -> bool:
        """Whether any keys stay exact: those of a window or sinks."""
        return self.window > 0 or self.sinks > 0

    @property
    def near_span(self) -> int:
        """Tokens of which every key is near: longer sequences may have others."""
        return max(2 * self.window, self.sinks)

    @property
    def has_far(self) -> bool:
        """Whether there are far keys, weighed by features."""
        return self.feature_map is not None

    def converts(self, layer: int) -> bool:
        """Whether this layer is converted."""
        return self.layers == "all" or layer in self.layers

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they go into config.json."""
        values = asdict(self)
        if self.layers != "all":
            values["layers"] = list(self.layers)
        values["per_layer"] = {str(layer): own for layer, own in values["per_layer"].items()}
        for own in (values, *values["per_layer"].values()):
            if isinstance(own.get("cache_size"), tuple):
                own["cache_size"] = list(own["cache_size"])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DiJiangConfig:
        """The inverse of to_dict. Unknown names are refused: a newer version wrote them."""
        if not isinstance(values, dict):
            raise TypeError(f"DiJiangConfig.from_dict: expected a dict, got {values!r}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"DiJiangConfig.from_dict: unknown {_listed(unknown)}. "
                f"Known: {_listed(sorted(known))}"
            )
        return cls(**values)


_OF_A_LAYER = {one.name for one in fields(DiJiangConfig)} - {"layers", "per_layer", "seed"}


def _checked_sizes(sizes) -> int | tuple[int, ...]:
    """A cache_size; one number where all heads have as many."""
    if isinstance(sizes, int):
        _check_int("cache_size", sizes, 0)
        return sizes
    if not isinstance(sizes, (tuple, list)) or not sizes:
        raise TypeError(
            "DiJiangConfig: cache_size must be a whole number or one for each kv head, got "
            f"{sizes!r}"
        )
    for size in sizes:
        _check_int("cache_size", size, 0)
    sizes = cache_sizes(sizes)
    return sizes[0] if len(sizes) == 1 else sizes


def _listed(names) -> str:
    return ", ".join(repr(name) for name in names)


def _check_type(name, value, expected):
    if not isinstance(value, expected):
        raise TypeError(f"DiJiangConfig: {name} must be of type {expected.__name__}, got {value!r}")


def _check_int(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"DiJiangConfig: {name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"DiJiangConfig: {name} must be at least {least}, got {value}")
