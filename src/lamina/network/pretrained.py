"""Pretrained models of `transformers`: a folder, or a GGUF file, becomes a Network."""

from __future__ import annotations

import functools
import io
import json
import struct
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.errors import MissingExtraError, NetworkError
from lamina.network.examples import example_of, inner_configs, loss_of, task_of
from lamina.network.isolate import one_line
from lamina.network.skeletons import (
    PREFIX,
    build_pretrained,
    clean_config,
    foreign_in,
    import_transformers,
    offline,
    own_class,
    source_of,
)
from lamina.network.source import Network

__all__ = [
    "PREFIX",
    "build_pretrained",
    "clean_config",
    "described",
    "is_folder",
    "is_gguf",
    "open_folder",
    "open_gguf",
    "source_of",
]
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MAX_HEADER = 100_000_000  # of a safetensors file, as the format says


def is_folder(path: str | Path) -> bool:
    """Whether a path is a folder that `transformers` could open."""
    folder = Path(path)
    return (folder / "config.json").is_file() or bool(_ggufs(folder))


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a GGUF file."""
    return str(path).endswith(".gguf") and Path(path).is_file()


def open_folder(path: str | Path) -> Network:
    """Open a Hugging Face folder: `config.json` and safetensors, in one file or in shards.

    The class is the one that `architectures` names, or the one `AutoModel` would take. Nothing is
    fetched, no code of the folder is run, and weights keep their dtype. A folder with a GGUF file
    and no safetensors is opened as `open_gguf` does.

    Args:
        path: the folder.

    Raises:
        NetworkError: it is no such folder, its class is not one of `transformers`, or its weights
            are not all there or cannot be read.
        MissingExtraError: `transformers` is not installed.
    """
    folder = Path(path)
    if not any(folder.glob("*.safetensors")) and _ggufs(folder):
        return open_gguf(_only_gguf(folder))
    config = _read_config(folder)
    files = _weight_files(folder)
    _refuse_foreign(config, str(folder))
    kind = _class_of(config, str(folder))
    dtype = _stored_dtype(files)
    try:
        with offline():
            config, _ = kind.config_class.get_config_dict(str(folder), local_files_only=True)
            settings = kind.config_class.from_dict(clean_config(config))
            module, said = kind.from_pretrained(
                str(folder), config=settings, local_files_only=True, dtype=dtype,
                use_safetensors=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # whatever transformers may raise
        raise NetworkError(
            "the folder cannot be opened", str(folder), one_line(error), "check the files"
        ) from error
    _refuse_missing(said, kind.__name__, str(folder))
    return described(
        module.eval(), source=source_of(module), name=folder.resolve().name,
        folder=str(folder), disk_bytes=sum(file.stat().st_size for file in files),
    )  # fmt: skip


def open_gguf(path: str | Path) -> Network:
    """Open a GGUF file; its values are expanded, and the file on disk counts as the original size.

    Raises:
        NetworkError: `transformers` cannot read it.
        MissingExtraError: `transformers`, or `gguf`, which it reads them with, is not installed.
    """
    file = Path(path)
    transformers = import_transformers()
    try:
        import gguf  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "gguf is not installed", str(file), "transformers reads these files with it",
            "pip install gguf",
        ) from None  # fmt: skip
    try:
        with offline(), redirect_stderr(io.StringIO()):  # it shows how far it is
            where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
            config = transformers.AutoConfig.from_pretrained(str(file.parent), **where)
            kinds = transformers.AutoModelForCausalLM._model_mapping
            auto = "AutoModelForCausalLM" if type(config) in kinds else "AutoModel"
            module = getattr(transformers, auto).from_pretrained(
                str(file.parent), dtype=torch.float32, **where
            )
    except Exception as error:  # whatever transformers may raise
        raise NetworkError(
            "the GGUF file cannot be opened", str(file), one_line(error), "check the file"
        ) from error
    return described(
        module.eval(), source=source_of(module), name=file.stem, folder=str(file),
        disk_bytes=file.stat().st_size,
    )  # fmt: skip


def described(module: nn.Module, **fields: Any) -> Network:
    """Return a Network of a `transformers` model, with its task, loss and example inputs."""
    config: Any = module.config
    for part in (config, *inner_configs(config)):
        if getattr(part, "use_cache", None):
            part.use_cache = False  # what a cache holds is of no use here, and costs memory
    return Network(
        module, example_kwargs=example_of(module), loss=loss_of(module), task=task_of(module),
        **{"name": type(module).__name__, **fields},
    )  # fmt: skip


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NetworkError(
            "not a Hugging Face folder", str(folder), one_line(error), "it needs a config.json"
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise NetworkError(
            "not a Hugging Face folder", str(folder), "config.json has no model_type"
        )
    return found


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors that `transformers` would read.

    Raises:
        NetworkError: there are none, or one that the index names is missing.
    """
    found = [folder / WHOLE]
    if not found[0].is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            found = [folder / str(name) for name in sorted(set(index.values()))]
        except FileNotFoundError:
            others = sorted(p.name for p in (*folder.glob("*.safetensors"), *folder.glob("*.bin")))
            why = f"it has {others[0]}" if others else "there are no weights"
            if others and others[0].endswith(".bin"):
                why = f"{others[0]} would have to be unpickled"
            raise NetworkError(
                f"the folder has no {WHOLE}", str(folder), why,
                "save it with save_pretrained (safetensors)",
            ) from None  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise NetworkError(
                "the index cannot be read", str(folder / INDEX), one_line(error)
            ) from None
    for file in found:
        if file.parent != folder or not file.is_file():
            raise NetworkError(
                "a file of weights is missing", str(file), f"{INDEX} names it", "fetch it again"
            )
    return found


def _stored_dtype(files: list[Path]) -> torch.dtype:
    """Return the dtype that all floating weights of some safetensors fit in."""
    kinds: set[torch.dtype] = set()
    for file in files:
        try:
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                if length > MAX_HEADER:
                    raise ValueError("its header is too long")
                header = json.loads(opened.read(length))
            entries = [v for k, v in header.items() if k != "__metadata__"]
            kinds |= {FLOATS[v["dtype"]] for v in entries if v["dtype"] in FLOATS}
        except (OSError, ValueError, KeyError, TypeError, struct.error, AttributeError) as error:
            raise NetworkError(
                "the weights cannot be read", str(file), one_line(error), "fetch the file again"
            ) from None
    return functools.reduce(torch.promote_types, kinds) if kinds else torch.float32


def _refuse_foreign(config: Mapping[str, Any], where: str) -> None:
    quantized = config.get("quantization_config")
    if quantized:
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else ""
        raise NetworkError(
            "the folder is quantized already", where, f"by {kind or 'a method it does not name'}",
            "start from the model it was made of",
        )  # fmt: skip
    why = foreign_in(config)
    if why:
        raise NetworkError(
            "the model is not of transformers alone", where, why,
            "open it yourself, and give lamina the nn.Module",
        )  # fmt: skip


def _refuse_missing(said: Mapping[str, Any], kind: str, where: str) -> None:
    missing = sorted(said.get("missing_keys") or ())
    if missing:
        raise NetworkError(
            f"{len(missing)} weights are not in the folder", where,
            f"a {kind} needs {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}",
            "name the class that was saved in config.json's architectures",
        )  # fmt: skip


def _class_of(config: Mapping[str, Any], where: str) -> Any:
    """Return the class of `transformers` that a folder's configuration asks for."""
    transformers = import_transformers()
    names = config.get("architectures")
    names = names if isinstance(names, list) else []
    for name in names:
        kind = own_class(str(name))
        if kind is not None:
            return kind
    named = str(names[0]) if names else "no architecture"
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


def _ggufs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf")) if folder.is_dir() else []


def _only_gguf(folder: Path) -> Path:
    found = _ggufs(folder)
    if len(found) > 1:
        raise NetworkError(
            "the folder has several GGUF files", str(folder),
            f"{', '.join(f.name for f in found[:4])}", "name one of them",
        )  # fmt: skip
    return found[0]
