"""Pretrained models of `transformers`: a folder becomes a Network, and its text a skeleton again.

What a file says of such a network is a text: the name of a class of `transformers` itself, and the
configuration, from which everything that would fetch or run something else has been taken out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.errors import FileError, MissingExtraError, NetworkError
from lamina.network.isolate import one_line
from lamina.network.source import Network

PREFIX = "transformers:"
# Names of code, of places on a hub, and of what only this machine knows: nothing a file may say.
LEFT_OUT = (
    "auto_map",
    "custom_pipelines",
    "_name_or_path",
    "name_or_path",
    "quantization_config",
    "use_kernels",
    "transformers_version",
    "use_pretrained_backbone",
    "use_timm_backbone",
    "backbone_kwargs",
    "timm_model_args",
)
HEADS = ("ForCausalLM", "LMHeadModel", "LMHead", "ForMaskedLM", "Classification",
         "ForConditionalGeneration", "ForCTC", "ForPreTraining")  # fmt: skip
TOKENS = 16  # of an example input


def is_folder(path: str | Path) -> bool:
    """Whether a path is a folder that `transformers` could open."""
    return (Path(path) / "config.json").is_file()


def open_folder(path: str | Path) -> Network:
    """Open a Hugging Face folder: `config.json` and safetensors, in one file or in shards.

    The class is the one that `architectures` names, or the one `AutoModel` would take. Nothing is
    fetched, no code of the folder is run, and weights keep their dtype.

    Args:
        path: the folder.

    Raises:
        NetworkError: it is no such folder, its class is not one of `transformers`, or its weights
            cannot be read.
        MissingExtraError: `transformers` is not installed.
    """
    folder = Path(path)
    config = _read_config(folder)
    if not any(folder.glob("*.safetensors")):
        found = sorted(p.name for p in folder.glob("*.bin"))
        raise NetworkError(
            "the folder has no safetensors", str(folder),
            f"{found[0]} would have to be unpickled" if found else "there are no weights",
            "save it with save_pretrained (safetensors)",
        )  # fmt: skip
    kind = _class_of(config, str(folder))
    try:
        with _offline():
            module = kind.from_pretrained(
                str(folder), local_files_only=True, dtype="auto", use_safetensors=True
            )
    except Exception as error:  # whatever transformers may raise
        raise NetworkError(
            "the folder cannot be opened", str(folder), one_line(error), "check the files"
        ) from error
    clean = clean_config(module.config.to_dict())
    return described(
        module.eval(), source=source_of(kind.__name__, clean), name=folder.resolve().name,
        folder=str(folder),
    )  # fmt: skip


def described(module: nn.Module, **fields: Any) -> Network:
    """Return a Network of a `transformers` model, with its task, loss and example inputs."""
    config: Any = module.config
    for part in (config, *_inner(config)):
        if getattr(part, "use_cache", None):
            part.use_cache = False  # what a cache holds is of no use here, and costs memory
    kind = type(module).__name__
    task = task_of(module)
    loss = "logits" if any(kind.endswith(head) for head in HEADS) else "features"
    return Network(
        module, example_kwargs=example_of(module), loss=loss, task=task,
        **{"name": kind, **fields},
    )  # fmt: skip


def source_of(kind: str, config: Mapping[str, Any]) -> str:
    """Return the text that rebuilds a skeleton: class and configuration, as compact JSON."""
    told = {"class": kind, "config": config}
    return PREFIX + json.dumps(told, separators=(",", ":"), sort_keys=True, ensure_ascii=True)


def clean_config(config: Any) -> Any:
    """Return a configuration without what would fetch or run something, at every depth.

    Example:
        >>> clean_config({"hidden_size": 8, "auto_map": {"AutoModel": "x.py"}})
        {'hidden_size': 8}
    """
    if isinstance(config, Mapping):
        return {
            str(key): clean_config(value)
            for key, value in config.items()
            if key not in LEFT_OUT and not str(key).endswith("_implementation")
        }
    if isinstance(config, (list, tuple)):
        return [clean_config(value) for value in config]
    if isinstance(config, torch.dtype):
        return str(config).removeprefix("torch.")
    return config


def build_pretrained(source: str) -> nn.Module:
    """Build the skeleton that a text of `source_of` stands for, its parameters on `meta`.

    Raises:
        FileError: the text is none of ours, or `transformers` cannot build such a network.
        MissingExtraError: `transformers` is not installed.
    """
    from accelerate import init_empty_weights

    try:
        told = json.loads(source.removeprefix(PREFIX))
        name, config = told["class"], clean_config(told["config"])
        if not isinstance(name, str) or not isinstance(config, dict):
            raise TypeError("class and configuration have other types")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(
            "the file does not say how to rebuild its network", "", str(error)
        ) from None
    transformers = _transformers()
    kind = _own_class(name)
    if kind is None:
        raise FileError(
            "unknown network class", name[:80], "transformers has no such model",
            f"this is version {transformers.__version__}; update it",
        )  # fmt: skip
    dtype = getattr(torch, str(config.get("dtype") or "float32"), torch.float32)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        dtype = torch.float32
    try:
        # Buffers are computed, not stored, so they need memory; parameters come from the file.
        with _offline(), init_empty_weights(include_buffers=False):
            module = kind._from_config(kind.config_class.from_dict(config), dtype=dtype)
    except Exception as error:  # whatever a configuration may make a class do
        raise FileError(
            "the network cannot be rebuilt", name, one_line(error),
            f"this is transformers {transformers.__version__}; try the one that wrote the file",
        ) from error  # fmt: skip
    return module.eval()  # type: ignore[no-any-return]


def task_of(module: nn.Module) -> str:
    """Return what a `transformers` model is for: `"causal"`, `"masked"`, `"classify"`,
    `"seq2seq"`, `"image"`, `"audio"` or `"features"`."""
    name, config = type(module).__name__, module.config
    main = str(getattr(module, "main_input_name", "input_ids"))
    if main == "pixel_values":
        return "image"
    if main in ("input_values", "input_features"):
        return "audio"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if name.endswith(("ForMaskedLM", "ForPreTraining")):
        return "masked"
    return "classify" if "Classification" in name else "features"


def example_of(module: nn.Module) -> dict[str, Any]:
    """Return a small batch of the inputs a `transformers` model takes, from a fixed seed."""
    config: Any = module.config
    main = str(getattr(module, "main_input_name", "input_ids"))
    draw = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if main == "pixel_values":
        side = _setting(config, "image_size", 224)
        high, wide = side if isinstance(side, (list, tuple)) else (side, side)
        image = (2, int(_setting(config, "num_channels", 3)), int(high), int(wide))
        return {main: torch.randn(image, generator=draw).to(dtype)}
    if main == "input_features":
        shape = (2, int(_setting(config, "num_mel_bins", 80)),
                 2 * int(_setting(config, "max_source_positions", 1500)))  # fmt: skip
        given = {main: torch.randn(shape, generator=draw).to(dtype)}
    elif main == "input_values":
        given = {main: torch.randn((2, 8000), generator=draw).to(dtype)}
    else:
        ids = _tokens(config, draw)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = _tokens(config, draw)
    return given


def _tokens(config: Any, draw: torch.Generator) -> torch.Tensor:
    most = int(_setting(config, "max_position_embeddings", 512))
    size = int(_setting(config, "vocab_size", 100))
    shape = (2, min(TOKENS, max(2, most // 2)))
    return torch.randint(min(5, size - 1), size, shape, generator=draw)


def _setting(config: Any, name: str, otherwise: Any) -> Any:
    """Return a setting of a configuration, or of one inside it."""
    for part in (config, *_inner(config)):
        found = getattr(part, name, None)
        if found is not None:
            return found
    return otherwise


def _inner(config: Any) -> list[Any]:
    parts = [v for v in vars(config).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    return [*parts, *(deeper for part in parts for deeper in _inner(part))]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NetworkError(
            "not a Hugging Face folder", str(folder), one_line(error), "it needs a config.json"
        ) from None
    if not isinstance(found, dict) or "model_type" not in found:
        raise NetworkError(
            "not a Hugging Face folder", str(folder), "config.json has no model_type"
        )
    return found


def _class_of(config: Mapping[str, Any], where: str) -> Any:
    """Return the class of `transformers` that a folder's configuration asks for."""
    transformers = _transformers()
    for name in config.get("architectures") or ():
        kind = _own_class(str(name))
        if kind is not None:
            return kind
    named = (config.get("architectures") or ["no architecture"])[0]
    if "auto_map" in config:
        raise NetworkError(
            "the folder brings its own code", where, f"{named} is not a class of transformers",
            "open it yourself, and give lamina the nn.Module",
        )  # fmt: skip
    try:
        kinds = transformers.AutoModel._model_mapping
        return kinds[type(transformers.CONFIG_MAPPING[config["model_type"]]())]
    except Exception as error:
        raise NetworkError(
            "unknown model", where, f"{named} of type {config['model_type']!r}: {one_line(error)}",
            f"this is transformers {transformers.__version__}; update it",
        ) from None  # fmt: skip


def _own_class(name: str) -> Any:
    """Return a model class of `transformers` itself, or None."""
    transformers = _transformers()
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(kind, type) or not kind.__module__.startswith("transformers.models."):
        return None
    return kind if issubclass(kind, transformers.PreTrainedModel) else None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError(
            "transformers is not installed", "", "Hugging Face models need it",
            "pip install 'lamina[hf]'",
        ) from None  # fmt: skip
    return transformers


@contextmanager
def _offline() -> Iterator[None]:
    """Keep `transformers` from asking a hub for anything, and from talking while it works."""
    from huggingface_hub import constants
    from transformers.utils import logging

    before, level = constants.HF_HUB_OFFLINE, logging.get_verbosity()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
