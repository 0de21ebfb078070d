"""A Hugging Face folder as a network without values, and its values tensor by tensor."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.errors import NetworkError
from lamina.network.isolate import one_line
from lamina.network.pretrained import _class_of, _read_config, _refuse_foreign, described
from lamina.network.shards import Stored, open_shards
from lamina.network.skeletons import clean_config, offline, source_of
from lamina.network.source import Network
from lamina.network.tensors import join

CHUNK = 1 << 25  # bytes that are read at a time


@dataclass(frozen=True)
class Lazy:
    """A network whose parameters are on `meta`, and where their values lie.

    Args:
        network: parameters on `meta`, buffers real.
        stored: by name in the network: tied tensors under each of their names.
        state: parameters and persistent buffers in `state_dict` order.
    """

    network: Network
    stored: Mapping[str, Stored]
    state: Mapping[str, torch.Tensor]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor's values, in the network's dtype.

        Raises:
            NetworkError: its shard cannot be read.
        """
        if name not in self.stored:
            return self.state[name].detach()
        return self.stored[name].tensor().to(self.state[name].dtype)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return rows of a tensor's 2-D view `[shape[0], rest]`, in the network's dtype."""
        return self.stored[name].read(first, last).to(self.state[name].dtype)

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[torch.Tensor]:
        """Yield a tensor's rows in order, about `size` bytes at a time."""
        if name not in self.stored:
            yield self.state[name].detach()
            return
        dtype = self.state[name].dtype
        for chunk in self.stored[name].chunks(size):
            yield chunk.to(dtype)

    def key(self, name: str) -> object:
        """Return what two names share if and only if they are one tensor."""
        tensor = self.state[name]
        return id(tensor) if tensor.numel() else name

    def firsts(self) -> list[str]:
        """Return the first name of every tensor, in order."""
        seen: dict[object, str] = {}
        return [name for name in self.state if seen.setdefault(self.key(name), name) == name]


def open_lazily(path: str | Path) -> Lazy:
    """Open a Hugging Face folder without reading its weights.

    It becomes what `open_folder` gives, but for the values: class, dtype, ties and source.

    Args:
        path: the folder.

    Raises:
        NetworkError: it is no such folder, its class is not one of `transformers`, a shard is
            missing or damaged, a tensor is missing, or tensors of the folder have to be made into
            others (merged experts), which can only be done with all of them.
        MissingExtraError: `transformers` is not installed.
    """
    folder = Path(path)
    config = _read_config(folder)
    shards = open_shards(folder)
    _refuse_foreign(config, str(folder))
    kind = _class_of(config, str(folder))
    from accelerate import init_empty_weights

    try:
        with offline():
            settings = kind.config_class.from_dict(clean_config(config))
            with init_empty_weights(include_buffers=False):
                module = kind._from_config(settings, dtype=_dtype_of(shards))
            names = _names(module, shards, str(folder))
            _tie(module, names)
    except NetworkError:
        raise
    except Exception as error:  # whatever transformers may raise
        raise NetworkError(
            "the folder cannot be opened", str(folder), one_line(error), "check the files"
        ) from error
    files = {stored.file for stored in shards.values()}
    network = described(
        module.eval(), source=source_of(module), name=folder.resolve().name, folder=str(folder),
        disk_bytes=sum(file.stat().st_size for file in files),
    )  # fmt: skip
    state = module.state_dict(keep_vars=True)
    return Lazy(network, _located(module, state, names, str(folder)), state)


def scan(lazy: Lazy, progress: Callable[[int, int, str], None] | None = None) -> str:
    """Read every tensor once and return the network's digest, as `Network.digest` has it.

    Raises:
        NetworkError: a value is not finite (`SiteError` of whole networks comes later, and from
            methods), or a shard cannot be read.
    """
    sha = hashlib.sha256()
    for i, (name, tensor) in enumerate(lazy.state.items()):
        if progress:
            progress(i, len(lazy.state), name)
        sha.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        for chunk in lazy.chunks(name):
            flat = chunk.contiguous().reshape(-1)
            if flat.numel():
                sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def with_digest(lazy: Lazy, digest: str) -> Lazy:
    """Return the network with its digest, which cannot be told from `meta` tensors."""
    return replace(lazy, network=replace(lazy.network, known=digest))


def _dtype_of(shards: Mapping[str, Stored]) -> torch.dtype:
    """Return the dtype that all floating weights fit in."""
    kinds = {s.dtype for s in shards.values() if s.dtype.is_floating_point}
    return functools.reduce(torch.promote_types, kinds) if kinds else torch.float32


def _names(module: Any, shards: Mapping[str, Stored], where: str) -> dict[str, Stored]:
    """Return the stored tensors by their names in the module, as `transformers` renames them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(module)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = module.base_model_prefix, module.state_dict()
    found: dict[str, Stored] = {}
    for name, stored in shards.items():
        new, converter = rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
            new, converter = rename_source_key(name, [], [], prefix, state)
        if new not in state:
            continue  # what the class has no use for is not loaded
        if converter is not None:
            raise NetworkError(
                "the folder cannot be streamed", f"{where}: {name}",
                f"transformers makes it into {new} together with others",
                "open it as a whole (stream=False)",
            )  # fmt: skip
        if stored.shape != tuple(state[new].shape):
            why = f"it is {list(stored.shape)}, and the class has {list(state[new].shape)}"
            raise NetworkError(
                "a tensor does not fit", f"{where}: {name}", why, "check config.json"
            )
        found[new] = stored
    return found


def _tie(module: Any, names: Mapping[str, Stored]) -> None:
    """Tie what `from_pretrained` ties: not two tensors that are both there, and differ."""
    tied: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        both = target in names and source in names
        if both and not _equal(names[target], names[source]):
            continue
        if target in names and source not in names:
            target, source = source, target
        path, _, leaf = target.rpartition(".")
        setattr(module.get_submodule(path), leaf, module.get_parameter(source))


def _equal(a: Stored, b: Stored) -> bool:
    pairs = zip(a.chunks(CHUNK), b.chunks(CHUNK), strict=True)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(torch.equal(x, y) for x, y in pairs)


def _located(
    module: nn.Module, state: Mapping[str, torch.Tensor], names: Mapping[str, Stored], where: str
) -> dict[str, Stored]:
    """Return where the values of all names lie, ties included.

    Raises:
        NetworkError: a parameter is nowhere.
    """
    by_tensor = {id(state[name]): stored for name, stored in names.items()}
    found = {n: by_tensor[id(t)] for n, t in state.items() if id(t) in by_tensor}
    missing = [n for n, t in state.items() if n not in found and t.is_meta and t.numel()]
    if missing:
        more = f"and {len(missing) - 1} more" if len(missing) > 1 else "no shard holds it"
        raise NetworkError(
            "a tensor is missing", f"{where}: {missing[0]}", more,
            "copy the folder again, or open it as a whole (stream=False): transformers then draws "
            "what is missing at random",
        )  # fmt: skip
    lost = [
        join(path, leaf)
        for path, part in module.named_modules()
        for leaf, buffer in part._buffers.items()
        if buffer is not None and buffer.is_meta and math.prod(buffer.shape)
    ]
    if any(name not in found for name in lost):
        raise NetworkError("a buffer has no values", f"{where}: {lost[0]}", "it is on meta")
    return found
