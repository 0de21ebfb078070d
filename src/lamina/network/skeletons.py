"""A pretrained model as a text, and its skeleton again: nothing is fetched, run or let grow.

What a file says of such a network is the name of a class of `transformers` itself, and the
configuration, from which everything that would fetch or run something else has been taken out. It
is a stranger's text all the same. So before any memory is taken the network is built once on the
`meta` device, where tensors have no values, and what it would hold is compared with what the file
holds; and numbers that would only be counted up to are bounded before that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from lamina.errors import FileError, MissingExtraError
from lamina.network.isolate import one_line

PREFIX = "transformers:"
# Names of code, of places on a hub, and of what only this machine knows: nothing a file may say.
LEFT_OUT = (
    "auto_map",
    "custom_pipelines",
    "name_or_path",
    "quantization_config",
    "use_kernels",
    "kernel_config",
    "trust_remote_code",
    "transformers_version",
    "use_pretrained_backbone",
    "backbone_kwargs",
    "timm_model_args",
)
COUNTS = re.compile(r"layer|depth|block|stage|expert|head|level|label")  # built so many times
MOST_COUNT, MOST_NUMBER, MOST_LENGTH = 1 << 16, 1 << 20, 1 << 32
UNCOUNTED = re.compile(
    r"theta|base|seed|position|length|seq|sampl|rate|factor|period|tokens?_|window|chunk|pixel"
)
# What a skeleton may have beyond what the file has: plans remove layers and make them smaller.
MORE_MODULES, MORE_VALUES, MORE_BYTES = 50, 1000, 4
FREE_MODULES, FREE_VALUES, FREE_BYTES = 4000, 1 << 23, 64 << 20
Held = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def source_of(module: nn.Module) -> str:
    """Return the text that rebuilds a skeleton: class and configuration, as compact JSON.

    `"module"` where a number in it is too large for `build_pretrained` to believe.
    """
    config: Any = module.config
    kind: Any = type(module)
    whole = clean_config(config.to_dict())
    short = clean_config(config.to_diff_dict())
    try:
        # Only what differs from the class's own settings, where it says as much.
        again = clean_config(kind.config_class.from_dict(json.loads(json.dumps(short))).to_dict())
        told = short if again == whole else whole
    except Exception:  # whatever a configuration may make of it
        told = whole
    if _excess(told, ""):
        return "module"  # such a file would be refused: whoever opens it gives the skeleton
    text = json.dumps(
        {"class": kind.__name__, "config": told}, separators=(",", ":"), sort_keys=True
    )
    return PREFIX + text


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
            if key not in LEFT_OUT
            and not str(key).startswith("_")
            and "_implementation" not in str(key)
        }
    if isinstance(config, (list, tuple)):
        return [clean_config(value) for value in config]
    if isinstance(config, torch.dtype):
        return str(config).removeprefix("torch.")
    return config


def foreign_in(config: Any) -> str:
    """Return what of a configuration another library would build, or `""`."""
    if isinstance(config, Mapping):
        kind = config.get("model_type")
        if config.get("use_timm_backbone") is True or "timm" in str(kind):
            return "a part of it is built by timm, which may fetch it"
        return next(filter(None, map(foreign_in, config.values())), "")
    if isinstance(config, (list, tuple)):
        return next(filter(None, map(foreign_in, config)), "")
    return ""


def build_pretrained(source: str, held: Held | None = None) -> nn.Module:
    """Build the skeleton that a text of `source_of` stands for, its parameters on `meta`.

    Args:
        source: the text.
        held: shape and dtype of every tensor of the file by name: what the skeleton may take is
            bounded by it, and its tensors get these dtypes.

    Raises:
        FileError: the text is none of ours, asks for more than the file can mean, or
            `transformers` cannot build such a network.
        MissingExtraError: `transformers` is not installed.
    """
    kind, config = _read(source)
    transformers = import_transformers()
    dtype = _dtype_of(config)
    limits = _Limits.of(held)
    try:
        with offline():
            with _counted(limits), torch.device("meta"):
                kind._from_config(kind.config_class.from_dict(_copy(config)), dtype=dtype)
            from accelerate import init_empty_weights

            # Buffers are computed, not stored, so they need memory; parameters are in the file.
            with init_empty_weights(include_buffers=False):
                module = kind._from_config(kind.config_class.from_dict(config), dtype=dtype)
        module.tie_weights()  # every parameter was made anew there, and ties came apart
    except FileError:
        raise
    except Exception as error:  # whatever a configuration may make a class do
        raise FileError(
            "the network cannot be rebuilt", kind.__name__, one_line(error),
            f"this is transformers {transformers.__version__}; try the one that wrote the file",
        ) from error  # fmt: skip
    _give_dtypes(module, held or {})
    return module.eval()  # type: ignore[no-any-return]


def _read(source: str) -> tuple[Any, dict[str, Any]]:
    """Return class and configuration of a text."""
    try:
        told = json.loads(source.removeprefix(PREFIX))
        name, config = told["class"], clean_config(told["config"])
        if not isinstance(name, str) or not isinstance(config, dict):
            raise TypeError("class and configuration have other types")
        foreign = foreign_in(config)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(
            "the file does not say how to rebuild its network", "", one_line(error)
        ) from None
    kind = own_class(name)
    if kind is None:
        raise FileError(
            "unknown network class", repr(name[:80]), "transformers has no such model",
            f"this is version {import_transformers().__version__}; update it",
        )  # fmt: skip
    if foreign or "timm" in kind.__module__:
        raise FileError("the network cannot be rebuilt", name, foreign or "timm builds it")
    why = _excess(config, "")
    if why:
        raise FileError("the network cannot be rebuilt", name, why)
    return kind, config


def _excess(value: Any, name: str) -> str:
    """Return which number of a configuration is too large to be true, or `""`."""
    if isinstance(value, Mapping):
        return next(filter(None, (_excess(v, k) for k, v in value.items())), "")
    if isinstance(value, list):
        return next(filter(None, (_excess(v, name) for v in value)), "")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return ""  # some say so: no limit
    most = MOST_COUNT if COUNTS.search(name) and "vocab" not in name else MOST_NUMBER
    if UNCOUNTED.search(name):
        most = MOST_LENGTH
    if isinstance(value, int) and abs(value) > most:
        return f"{name[:80]} is {value if abs(value) < 1 << 64 else 'huge'}"
    return ""


@dataclass
class _Limits:
    """What a skeleton may hold, and what it has asked for so far."""

    modules: int
    values: int
    bytes: int
    found: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("m", "v", "b"), 0))

    @classmethod
    def of(cls, held: Held | None) -> _Limits:
        if held is None:  # the caller's own text
            return cls(1 << 40, 1 << 60, 1 << 60)
        values = sum(math.prod(shape) for shape, _ in held.values())
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in held.values())
        return cls(
            FREE_MODULES + MORE_MODULES * len(held),
            FREE_VALUES + MORE_VALUES * values,
            FREE_BYTES + MORE_BYTES * size,
        )

    def count(self, kind: str, number: int) -> None:
        self.found[kind] += number
        most = {"m": self.modules, "v": self.values, "b": self.bytes}[kind]
        if self.found[kind] > most:
            what = {"m": "layers", "v": "parameters", "b": "bytes of buffers"}[kind]
            raise FileError(
                "the network cannot be rebuilt", "", f"it would have over {most} {what}",
                "the file holds nothing like that",
            )  # fmt: skip


@contextmanager
def _counted(limits: _Limits) -> Iterator[None]:
    """Count what modules are given while a network is built, and stop where it is too much."""

    def module(owner: nn.Module, name: str, given: Any) -> None:
        limits.count("m", 1)

    def parameter(owner: nn.Module, name: str, given: Any) -> None:
        if given is not None:
            limits.count("v", given.numel())

    def buffer(owner: nn.Module, name: str, given: Any) -> None:
        if given is not None:
            limits.count("b", given.numel() * given.element_size())

    handles = [
        hooks.register_module_module_registration_hook(module),
        hooks.register_module_parameter_registration_hook(parameter),
        hooks.register_module_buffer_registration_hook(buffer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _give_dtypes(module: nn.Module, held: Held) -> None:
    """Let parameters and buffers have the dtypes that the file holds them in.

    A layer that an edit makes others of has the dtype of these.
    """
    parts: dict[tuple[str, str], torch.dtype] = {}
    for name, (_, dtype) in held.items():
        path, _, leaf = name.rpartition(".")
        if dtype.is_floating_point:
            parts[path.rpartition(".")[0], leaf] = dtype
    made: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules():
        for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None or leaf in owner._non_persistent_buffers_set:
                continue
            name = f"{path}.{leaf}" if path else leaf
            wanted = held[name][1] if name in held else parts.get((path, leaf))
            if wanted is None or wanted == tensor.dtype or not tensor.is_floating_point():
                continue
            if isinstance(tensor, nn.Parameter):
                new = made.setdefault(
                    id(tensor), nn.Parameter(tensor.data.to(wanted), tensor.requires_grad)
                )
                owner._parameters[leaf] = new
            elif name in held:
                owner._buffers[leaf] = tensor.to(wanted)


def _dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    found = getattr(torch, str(config.get("dtype") or "float32"), None)
    if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1:
        return found
    return torch.float32


def _copy(config: Any) -> Any:
    """Return a configuration anew: classes take it apart."""
    if isinstance(config, dict):
        return {k: _copy(v) for k, v in config.items()}
    return [_copy(v) for v in config] if isinstance(config, list) else config


def own_class(name: str) -> Any:
    """Return a model class of `transformers` itself, or None."""
    transformers = import_transformers()
    try:
        kind = getattr(transformers, name, None) if name.isidentifier() else None
    except Exception:  # it needs a library that is not here
        return None
    if not isinstance(kind, type) or not kind.__module__.startswith("transformers.models."):
        return None
    return kind if issubclass(kind, transformers.PreTrainedModel) else None


def import_transformers() -> Any:
    """Return the library.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError(
            "transformers is not installed", "", "Hugging Face models need it",
            "pip install 'lamina[hf]'",
        ) from None  # fmt: skip
    return transformers


@contextmanager
def offline() -> Iterator[None]:
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
