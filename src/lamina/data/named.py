"""Tensors under the names that a pretrained network calls its inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.data.arrays import SPELLINGS, split_arrays
from lamina.data.loaders import Data, TensorLoader
from lamina.errors import DataError
from lamina.network.source import Network

SUFFIXES = tuple(f"_{s}" for spellings in SPELLINGS.values() for s in spellings)
BATCH = 16


def main_name(network: Network | None) -> str:
    """Return what a `transformers` network calls its main input; `""` for any other network."""
    if network is None or not network.task:
        return ""
    return str(getattr(network.module, "main_input_name", ""))


def with_names(data: Data, network: Network) -> Data:
    """Return data of bare tensors as dicts with the network's own name for them.

    An encoder-decoder also gets the one token that decoders start from, if it needs one.
    """
    splits = ("train", "calibration", "validation", "test")
    return replace(data, **{s: _named(getattr(data, s), network) for s in splits})


def check_classes(data: Data, network: Network | None, spec: str) -> Data:
    """Return data whose class labels a network can tell apart.

    Raises:
        DataError: there are more classes than scores.
    """
    if network is not None and data.classes and network.task in ("classify", "image", "audio"):
        config: Any = network.module.config
        known = getattr(config, "num_labels", None)
        if network.loss == "logits" and isinstance(known, int) and 1 < known < data.classes:
            raise DataError(
                "the labels do not fit the network", spec,
                f"they are {data.classes} classes, the network tells {known} apart",
            )  # fmt: skip
    return data


def _named(loader: Any, network: Network) -> Any:
    if not isinstance(loader, TensorLoader) or isinstance(loader.x, Mapping):
        return loader
    name, before = main_name(network), loader.prepare
    given = {name: loader.x}
    if "decoder_input_ids" in network.example_kwargs:
        config: Any = network.module.config
        start = int(getattr(config, "decoder_start_token_id", None) or 0)
        given["decoder_input_ids"] = torch.full((len(loader.x), 1), start)

    def prepare(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch if before is None else {**batch, name: before(batch[name])}

    made: Callable[[Any], Any] = prepare
    return TensorLoader(given, loader.y, loader.batch_size, loader.shuffle, None, loader.seed, made)


def split_named(arrays: Mapping[str, Tensor], name: str, network: Network | None) -> Data:
    """Split arrays as `split_arrays` does; they may be called what the network calls its inputs.

    Args:
        arrays: `x` and `y`, with `_train`, ... or without; or the names of the network's arguments
            (`input_values`, `decoder_input_ids`, ...) and `labels` in their place.
        network: a pretrained one, or any other, whose arrays are `x` and `y`.
    """
    main = main_name(network)
    if network is None or not main:
        return split_arrays(arrays, name)
    stems = {key: _stem(key) for key in arrays}
    if main not in stems.values():
        return with_names(split_arrays(arrays, name, BATCH), network)
    # Split row numbers in place of the inputs, which may be several.
    numbers: dict[str, Tensor] = {}
    for key, array in arrays.items():
        if stems[key] == main:
            numbers["x" + key.removeprefix(main)] = torch.arange(len(array))[:, None]
        elif stems[key] in ("labels", "y"):
            numbers["y" + key.removeprefix(stems[key])] = array
    data = split_arrays(numbers, name, BATCH)
    inputs = sorted({s for s in stems.values() if s not in ("labels", "y")})

    def of(split: str, loader: Any) -> Any:
        if not isinstance(loader, TensorLoader) or isinstance(loader.x, Mapping):
            return loader
        wanted = "train" if split == "calibration" else split
        ends = [f"_{s}" for s in (*SPELLINGS[split], *SPELLINGS[wanted], *SPELLINGS["train"])]
        end = next((e for e in (*ends, "") if main + e in arrays), "")
        rows = loader.x[:, 0]
        given = {s: arrays[s + end][rows] for s in inputs if s + end in arrays}
        return TensorLoader(given, loader.y, BATCH, loader.shuffle, None, loader.seed)

    splits = ("train", "calibration", "validation", "test")
    return replace(data, **{s: of(s, getattr(data, s)) for s in splits})


def _stem(key: str) -> str:
    return next((key.removesuffix(s) for s in SUFFIXES if key.endswith(s)), key)


def image_moments(network: Network | None) -> tuple[list[float], list[float], float] | None:
    """Return mean, standard deviation and scale of pixels that a folder's preprocessor asks for."""
    if network is None or not network.folder:
        return None
    try:
        text = (Path(network.folder) / "preprocessor_config.json").read_text(encoding="utf-8")
        said = json.loads(text)
        scale = float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0
        if not said.get("do_normalize", True):
            return [0.0], [1.0], scale
        mean, std = said["image_mean"], said["image_std"]
        mean, std = ([float(v) for v in (m if isinstance(m, list) else [m])] for m in (mean, std))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return (mean, std, scale) if all(std) and len(mean) == len(std) else None
