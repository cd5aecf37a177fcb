"""Kernels of other packages, compared with where they are installed.

    pip install pytorch-fast-transformers torch-dct flash-linear-attention

The dijiang package needs neither. What is missing is left out, and the result's CSV says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module, metadata

#: Package -> (module, function).
FUNCTIONS = {
    "pytorch-fast-transformers": ("fast_transformers.causal_product", "causal_dot_product"),
    "torch-dct": ("torch_dct", "dct"),
    "flash-linear-attention": ("fla.ops.linear_attn", "chunk_linear_attn"),
    "fla-core": ("fla.ops.simple_gla", "chunk_simple_gla"),
}


def find(package: str) -> Callable | None:
    """The package's function; None where it is not installed or does not load."""
    module, name = FUNCTIONS[package]
    try:
        return getattr(import_module(module), name)
    except Exception:  # without a device, some fail in ways of their own
        return None


def note(packages: Sequence[str]) -> str:
    """Which of them are compared with, at what version, and which are missing."""
    return ", ".join(
        f"{package} {_version(package)}" if find(package) else f"{package} not installed"
        for package in packages
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"
