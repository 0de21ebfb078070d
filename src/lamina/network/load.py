"""Opening what a user passes as a network, and checking that it can be worked on."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lamina.errors import NetworkError
from lamina.network.isolate import isolated, one_line
from lamina.network.source import Network, main_output
from lamina.network.tensors import named_tensors


def open_network(
    model: nn.Module | Network | str, example_inputs: Any = None, *, name: str | None = None
) -> Network:
    """Open a network: a module, a Network, or `"file.py:function"`.

    Names of the zoo and `.lamina` files are opened elsewhere. The function takes no arguments and
    returns a module, a pair `(module, example_inputs)` or a Network; its file is executed.

    Args:
        model: what to open.
        example_inputs: one forward pass: a tensor, a tuple of positional inputs, or a mapping of
            keyword inputs. Wins over what the model brings along.
        name: a short name for reports; by default the class, or the file.

    Raises:
        NetworkError: the file or the function is missing, it raises, or it gives something else.

    Example:
        >>> open_network(nn.Linear(3, 2), torch.zeros(1, 3)).name
        'Linear'
    """
    if isinstance(model, Network):
        network = model
    elif isinstance(model, nn.Module):
        network = _wrap(model)
    elif isinstance(model, (str, Path)):
        network = _from_file(str(model))
    else:
        raise NetworkError(
            "cannot open a network", type(model).__name__, "it is not an nn.Module", _ACCEPTED
        )
    if example_inputs is not None:
        args, kwargs = inputs_given(example_inputs)
        network = replace(network, example_inputs=args, example_kwargs=kwargs)
    return replace(network, name=name) if name else network


_ACCEPTED = "give an nn.Module, a Network, a zoo name, or 'file.py:function'"


def check_network(network: Network) -> None:
    """Check that a network has finite weights and, with example inputs, that it runs on them.

    Parameters that are scalars or empty are fine.

    Raises:
        NetworkError: it has no parameters, a weight is NaN or infinite, uninitialised or without
            values, or `check_runs` fails.

    Example:
        >>> check_network(Network(nn.Linear(3, 2), (torch.zeros(1, 3),)))
    """
    tensors = named_tensors(network.module).by_name
    parameters = dict(network.module.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise NetworkError(
                "a parameter is uninitialised", name, "its shape is not known yet",
                "run the network once before compressing it",
            )  # fmt: skip
        if tensor.is_meta:
            raise NetworkError(
                "a tensor has no values", name, "it is on the meta device", "load the weights first"
            )
        # A buffer may hold -inf on purpose (attention masks); NaN is never meant.
        bad = _count_bad(tensor, infinite=name in parameters)
        if bad:
            raise NetworkError(
                f"{bad} of {tensor.numel()} values are not finite",
                f"{name} {tuple(tensor.shape)}",
                "a network with NaN or infinite weights cannot be compressed",
                "train it again, or load a good checkpoint",
            )
    if not any(parameter.numel() for parameter in parameters.values()):
        raise NetworkError(
            "the network has no parameters", network.name, "there is nothing to compress"
        )
    if network.example_inputs or network.example_kwargs:
        check_runs(network)


def check_runs(network: Network) -> torch.Tensor:
    """Run a copy of the network on its example inputs and return the main output.

    Raises:
        NetworkError: there are no example inputs, the forward pass raises, or its main output is no
            finite floating tensor.

    Example:
        >>> check_runs(Network(nn.Linear(3, 2), (torch.zeros(1, 3),))).shape
        torch.Size([1, 2])
    """
    if not network.example_inputs and not network.example_kwargs:
        raise NetworkError(
            "the network has no example inputs", network.name, "it cannot be run",
            "give example_inputs=(x,), or data whose batches it takes",
        )  # fmt: skip
    shapes = _shapes(network)
    try:
        with isolated(network) as (module, args, kwargs), torch.no_grad():
            result = module(*args, **kwargs)
    except Exception as error:  # whatever a user's forward may raise
        raise NetworkError(
            "the network fails on its example inputs", shapes, one_line(error),
            "check their number, shapes and types",
        ) from error  # fmt: skip
    try:
        output = main_output(result)
    except TypeError:
        output = None
    if output is None or not output.is_floating_point():
        found = type(result).__name__ if output is None else f"a {output.dtype} tensor"
        raise NetworkError(
            "the network returns no floating tensor", network.name, f"it returns {found}",
            "return scores or features, not labels",
        )  # fmt: skip
    bad = int((~torch.isfinite(output)).sum())
    if bad:
        raise NetworkError(
            f"{bad} of {output.numel()} outputs are not finite", shapes,
            "errors are measured on the outputs", "check the example inputs and the weights",
        )  # fmt: skip
    return output


def _wrap(module: nn.Module, **fields: Any) -> Network:
    if isinstance(module, torch.jit.ScriptModule):
        raise NetworkError(
            "cannot open a TorchScript module", type(module).__name__,
            "its layers cannot be replaced", "give the nn.Module it was made from",
        )  # fmt: skip
    # torch.compile wraps; what it wraps has the user's own names, and compiles again.
    inner = getattr(module, "_orig_mod", None)
    module = inner if isinstance(inner, nn.Module) else module
    return Network(module, **{"name": type(module).__name__, **fields})


def inputs_given(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword inputs of a tensor, a sequence or a mapping of them."""
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given) if isinstance(given, (tuple, list)) else (given,)), {}


def load_function(spec: str) -> Callable[..., Any]:
    """Return a function of a user's file, named as `"file.py:function"`; the file is executed.

    Raises:
        NetworkError: the file or the function is missing, or the file raises.
    """
    path, colon, function = spec.rpartition(":")
    if spec.endswith(".py"):
        path, function = spec, ""
    elif not colon or not path.endswith(".py"):
        raise NetworkError("cannot open a network", repr(spec), "there is no such name", _ACCEPTED)
    file = Path(path)
    if not file.is_file():
        raise NetworkError("no such file", path, "", "the form is file.py:function")
    with _neighbours(file):
        module = _import(file)
    found = getattr(module, function, None) if function else None
    if not callable(found):
        raise NetworkError(
            f"no function {function!r}" if function else "no function is named", path,
            f"it has {', '.join(_functions(module)) or 'none'}", "the form is file.py:function",
        )  # fmt: skip
    return found  # type: ignore[no-any-return]


@contextmanager
def _neighbours(file: Path) -> Iterator[None]:
    """Let a user's file import what lies beside it."""
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _from_file(spec: str) -> Network:
    build = load_function(spec)
    file = Path(spec.rpartition(":")[0])
    with _neighbours(file):
        made = _call(build, spec)
    fields = {"source": f"python:{spec}", "name": file.stem}
    if isinstance(made, Network):
        return replace(made, source=fields["source"])
    if isinstance(made, nn.Module):
        return _wrap(made, **fields)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        args, kwargs = inputs_given(made[1])
        return _wrap(made[0], example_inputs=args, example_kwargs=kwargs, **fields)
    raise NetworkError(
        "the function returned no network", spec, f"it returned a {type(made).__name__}",
        "return an nn.Module, or (module, example_inputs)",
    )  # fmt: skip


def _import(file: Path) -> ModuleType:
    """Execute a user's file as a module of its own, under a name no other module can have."""
    name = "_lamina_user_" + hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise NetworkError("cannot import the file", str(file))
    module = importlib.util.module_from_spec(found)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses and pickle look a class up by its module's name
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise NetworkError(
            "the file fails when it is imported", str(file), _where(error, file), "mend the file"
        ) from error
    return module


def _call(build: Callable[[], Any], spec: str) -> Any:
    try:
        inspect.signature(build).bind()
    except TypeError as error:
        raise NetworkError(
            "the function needs arguments", spec, str(error), "name one that takes none"
        ) from error
    except ValueError:  # no signature to be had (built-ins)
        pass
    try:
        return build()
    except (Exception, SystemExit) as error:  # whatever a user's function may raise
        file = Path(spec.rpartition(":")[0])
        raise NetworkError("the function raised an error", spec, _where(error, file)) from error


def _where(error: BaseException, file: Path) -> str:
    """Return an error in one line, with the last line of the user's file it came through."""
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name == file.name:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{one_line(error)} (line {line})" if line else one_line(error)


def _functions(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    ]


def _count_bad(tensor: torch.Tensor, infinite: bool) -> int:
    """Count NaN, and infinite values where they count as bad; of any layout and dtype."""
    values = tensor.detach()
    if values.layout == torch.sparse_coo:
        values = values.coalesce().values()
    elif values.layout != torch.strided:
        values = values.values()
    if values.is_quantized or not (values.is_floating_point() or values.is_complex()):
        return 0
    if values.element_size() == 1:  # float8 has no isfinite of its own
        values = values.float()
    bad = ~torch.isfinite(values) if infinite else torch.isnan(values)
    return int(bad.sum())


def _shapes(network: Network) -> str:
    given = [*network.example_inputs, *network.example_kwargs.values()]
    return "inputs " + ", ".join(
        str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
        for value in given
    )
