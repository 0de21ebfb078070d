"""Hugging Face folders made of a `.lamina` file: dense for everyone, or small for one import more.

A folder is made beside its place under a hidden name, and renamed: it is there whole, or not.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lamina import artifact
from lamina.artifact import Package
from lamina.artifact.records import Record
from lamina.errors import FileError, NetworkError, RunError
from lamina.network.skeletons import PREFIX, build_pretrained
from lamina.network.small_folders import FORMAT, METHOD, SMALL
from lamina.run import umask, write_atomic

NEUTRAL = ("tie", "layout", "int8", "bf16")  # edits that leave every tensor as it was
BESIDE = (  # what belongs to a model besides its weights, and is no code
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "*processor_config.json", "chat_template*", "generation_config.json",
    "modules.json", "sentence*_config.json", "config_sentence_transformers.json",
    "[0-9]_*/config.json", "LICENSE*",
)  # fmt: skip
ENDINGS = (".json", ".jinja", ".txt", ".model", ".md", "")


def write_dense_folder(package: Package, out: str | Path, like: str | Path | None = None) -> None:
    """Write a folder that `from_pretrained` loads without Lamina.

    Tensors are decoded one at a time, or all together where `transformers` stores a family's
    weights otherwise than it holds them.

    Args:
        package: the file of a `transformers` network whose layers kept their shapes.
        out: the folder; it is new or empty.
        like: a folder whose tokenizer and other small files come along.

    Raises:
        NetworkError: the network is none of `transformers`, or layers have changed.
        FileError: the file is damaged, or does not fit its network.
        RunError: it cannot be written.
        MissingExtraError: `transformers` is not installed.
    """
    _check_source(package)
    changed = [e for e in package.edits if e.form not in NEUTRAL]
    if changed:
        forms = ", ".join(f"{e.path} {e.form}" for e in changed[:6])
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise NetworkError(
            "transformers alone cannot load this network", forms + more,
            f"{len(changed)} of its layers are no longer what transformers would build",
            "use --to lamina-hf",
        )  # fmt: skip
    model: Any = skeleton_of(package)
    with whole_folder(out, like) as folder:
        if _is_stored_otherwise(model):
            whole: Any = artifact.restore(package, model)
            with _without_bars():
                whole.save_pretrained(str(folder), max_shard_size="5GB")
            return
        artifact.write_shards(_named(package, model), folder)
        _write_config(model, folder, {})
        if model.can_generate():
            model.generation_config.save_pretrained(str(folder))


def write_small_folder(
    package: Package, file: str | Path, out: str | Path, like: str | Path | None = None
) -> None:
    """Write a folder that keeps the small file, and loads after `import lamina.hf`.

    Args:
        package: what `file` holds.
        file: the `.lamina` file of a `transformers` network; it goes into the folder as it is.
        out, like: as `write_dense_folder`.

    Raises:
        As `write_dense_folder`; here every edit is welcome.
    """
    _check_source(package)
    model: Any = skeleton_of(package)
    with whole_folder(out, like) as folder:
        try:
            shutil.copyfile(file, folder / SMALL)
        except OSError as error:
            raise RunError("cannot write", str(out), error.strerror or str(error)) from None
        told = {"quant_method": METHOD, "format": FORMAT, "by": package.by}
        _write_config(model, folder, {"quantization_config": told})
        if model.can_generate():
            model.generation_config.save_pretrained(str(folder))


@contextmanager
def whole_folder(out: str | Path, like: str | Path | None = None) -> Iterator[Path]:
    """Give a folder to write into, which takes its place at `out` once all is written.

    Raises:
        RunError: `out` is a file, or a folder that is not empty, or it cannot be written.
        NetworkError: `like` is no folder.
    """
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        why = "the folder is not empty" if path.is_dir() else "it is a file"
        raise RunError("cannot write", str(path), why, "name a new folder")
    if like is not None and not Path(like).is_dir():
        raise NetworkError("no such folder", str(like), "", "--like names the original folder")
    made = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(".part", f".{path.name}.", path.parent))
        yield made
        if like is not None:
            _copy_beside(Path(like), made)
        made.chmod(0o777 & ~umask())
        os.replace(made, path)
        made = None
    except OSError as error:
        why = error.strerror or str(error)
        raise RunError("cannot write", str(path), why, "free space or choose a folder") from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _copy_beside(like: Path, folder: Path) -> None:
    """Copy a model's tokenizer and other small files: never weights, code, or the configuration."""
    for pattern in BESIDE:
        for path in sorted(like.glob(pattern)):
            if path.is_file() and path.suffix in ENDINGS:
                target = folder / path.relative_to(like)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def skeleton_of(package: Package) -> nn.Module:
    """Rebuild a file's skeleton, its parameters on `meta`; the file bounds what it may take.

    Raises:
        FileError: it cannot be rebuilt.
    """
    held = {name: (record.shape, record.dtype) for name, record in package.records.items()}
    return build_pretrained(package.skeleton, held)


def _check_source(package: Package) -> None:
    if not package.skeleton.startswith(PREFIX):
        raise NetworkError(
            "not a network of transformers", package.skeleton[:80],
            "a Hugging Face folder holds nothing else", "use --to safetensors or --to onnx",
        )  # fmt: skip


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _is_stored_otherwise(model: nn.Module) -> bool:
    """Whether `transformers` writes this family under other names, or in other pieces."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    found = get_model_conversion_mapping(model, add_legacy=False)
    return any(not isinstance(change, PrefixChange) for change in found)


def _named(package: Package, model: Any) -> dict[str, Record]:
    """Return each tensor's record under the name `transformers` would write it by.

    Of names that `transformers` ties, one is written; of those that Lamina tied, all are.

    Raises:
        FileError: the file's tensors are not those of its network.
    """
    ties = dict(getattr(model, "all_tied_weights_keys", {}))
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    alike = _groups(model)
    wanted = []
    for names in alike.values():
        own = [name for name in names if name not in ties] or names
        wanted.append(own[0])
    artifact.install_edits(model, [e for e in package.edits if e.form == "tie"])
    artifact.check_shapes(package.records, artifact.tensors_of(model, meta=True))
    held: dict[str, Record] = {}
    for names in _groups(model).values():
        stored = [name for name in names if name in package.records]
        if not stored:
            raise FileError("the file lacks a tensor of its network", names[0])
        held |= dict.fromkeys(names, package.records[stored[-1]])
    return {name: held[name] for name in wanted if name not in left_out}


def _groups(model: nn.Module) -> dict[Any, list[str]]:
    """Return the names of a module's state by the tensor they stand for."""
    found: dict[Any, list[str]] = {}
    for name, tensor in artifact.tensors_of(model, meta=True).items():
        found.setdefault(id(tensor), []).append(name)
    return found


def _write_config(model: Any, folder: Path, more: Mapping[str, Any]) -> None:
    """Write `config.json` as `save_pretrained` would, and what comes on top."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    told = json.loads(model.config.to_json_string(use_diff=True)) | dict(more)
    text = json.dumps(told, indent=2, sort_keys=True, ensure_ascii=True)
    write_atomic(folder / "config.json", text.encode() + b"\n")


def read_small(path: str | Path) -> Package:
    """Read the small file of a folder.

    Raises:
        FileError: it is damaged, or not of a `transformers` network.
    """
    package = artifact.read(path)
    if not package.skeleton.startswith(PREFIX):
        raise FileError("not a network of transformers", str(path), package.skeleton[:80])
    return package
