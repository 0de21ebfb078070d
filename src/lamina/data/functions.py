"""Data from the user's own function, in a file or in an installed module."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lamina.data.batches import as_data
from lamina.data.loaders import Data
from lamina.errors import DataError, LaminaError
from lamina.network.source import Network

MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_function(spec: str) -> bool:
    """Whether a spec names a function of a file or of a module.

    Example:
        >>> is_function("load.py:make"), is_function("pack.load:make"), is_function("x.npz")
        (True, True, False)
    """
    return spec.rpartition(":")[0].endswith(".py") or MODULE.fullmatch(spec) is not None


def call_function(spec: str, network: Network | None = None) -> Data:
    """Run the user's function and read what it returns.

    Args:
        spec: `file.py:function`, run as a module of its own; or `package.module:function`, imported
            as Python does, the working folder first.
        network: given to a function that takes one argument.

    Raises:
        DataError: file, module or function are missing, or the function fails or gives no data.
    """
    path, _, name = spec.rpartition(":")
    try:
        with _opened(path) as module:
            made = getattr(module, name, None)
            if not callable(made):
                where = f"in {Path(path).name}" if path.endswith(".py") else f"in {path}"
                raise DataError("no such function", spec, fix=f"define {name}() {where}")
            given = network is not None and _takes_one(made)
            data = as_data(made(network) if given else made())
    except LaminaError:
        raise
    except Exception as error:
        raise DataError(
            "the data function failed", spec, f"{type(error).__name__}: {error}"
        ) from error
    if data is None:
        raise DataError("the data function returned None", spec, fix="return loaders or batches")
    return data


def _takes_one(made: Any) -> bool:
    try:
        inspect.signature(made).bind()
        return False
    except TypeError:
        pass
    except ValueError:  # no signature to be had
        return False
    try:
        inspect.signature(made).bind(None)
        return True
    except TypeError:
        return False


@contextmanager
def _opened(path: str) -> Iterator[ModuleType]:
    """Yield the module a function lies in; its neighbours can be imported meanwhile."""
    is_file = path.endswith(".py")
    if is_file and not Path(path).is_file():
        why = "it is a folder" if Path(path).is_dir() else "there is no such file"
        raise DataError("cannot open data", path, why, "check the path")
    beside = str(Path(path).resolve().parent) if is_file else os.getcwd()
    sys.path.insert(0, beside)
    try:
        yield _execute(Path(path)) if is_file else _import(path)
    finally:
        if beside in sys.path:
            sys.path.remove(beside)


def _execute(path: Path) -> ModuleType:
    # Data classes and DataLoader workers look their module up by name, so it has to be there.
    name = f"lamina_user_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise DataError(
                "cannot open data", name, "there is no such module",
                "use mnist-10k, file.npz, images:FOLDER, text:FILE, jsonl:FILE, file.py:function "
                "or package.module:function",
            ) from None  # fmt: skip
        raise
