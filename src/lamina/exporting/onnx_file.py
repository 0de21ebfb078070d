"""ONNX files: exported by torch, with integer products where asked for, checked in onnxruntime."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.errors import MissingExtraError, NetworkError, RunError
from lamina.exporting.checking import (
    Compared,
    Named,
    compare,
    names_of,
    others,
    outputs_of,
    split,
    varied,
)
from lamina.exporting.integer_products import (
    Weight,
    in_integers,
    linear_of,
    quantized,
    tables_of,
    weights_of,
)
from lamina.forms.half import SHORT, Half
from lamina.forms.input_quantized import InputQuantized
from lamina.forms.integer import Integer
from lamina.network.isolate import one_line
from lamina.network.source import Network
from lamina.run import write_atomic

# Distance of the outputs over their length: of float32, of half precision, with integers.
TOLERANCE, HALF_TOLERANCE, INTEGER_TOLERANCE = 1e-3, 0.03, 0.3
HALVES = (torch.float16, torch.bfloat16)
LIMIT = 1_900_000_000  # bytes; protocol buffers end at 2 GiB


@dataclass(frozen=True)
class Written:
    """What an ONNX file is, and how near it is to the network.

    Args:
        path: the file.
        size: with the data beside it, if it has any [bytes].
        error: `|onnx - torch| / |torch|`, lengths as vectors, of the worst output; of a network
            that rounds what its layers are given, of the middle sample.
        largest: the largest absolute difference.
        tolerance: what `error` may be at most.
        integers: how many layers multiply integers.
        layers: how many linear layers there are.
        dynamic: sizes of inputs that may differ, as `input_ids[0]`.
        inputs, outputs: their names.
        note: what a user should know besides.
    """

    path: Path
    size: int
    error: float
    largest: float
    tolerance: float
    integers: int
    layers: int
    dynamic: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    note: str = ""

    def line(self) -> str:
        """Return it as one line for people."""
        free = f"free sizes {', '.join(self.dynamic)}" if self.dynamic else "sizes are fixed"
        whole = f"{self.integers} of {self.layers} linear layers in integers, "
        return (
            f"onnx     {self.path} ({self.size:,} bytes; {whole if self.integers else ''}{free})\n"
            f"checked  in onnxruntime: relative error {self.error:.1e} (at most "
            f"{self.tolerance:.0e}), largest difference {self.largest:.1e}"
            + (f"\nnote     {self.note}" if self.note else "")
        )


def write_onnx(
    network: Network, out: str | Path, *, int8: bool | None = None, tolerance: float | None = None
) -> Written:
    """Write a network as an ONNX file, after onnxruntime has given the same outputs.

    Layers of the form "int8" become integer products (`DynamicQuantizeLinear`, `MatMulInteger`)
    with the very integers and scales they hold. Batch and sequence lengths are left free where the
    network allows it, and the outputs are then compared for other sizes too. Half precision is
    written as float32, which every machine computes.

    Args:
        network: with example inputs; it is not changed.
        out: the file; beyond 1.9 GB its values lie in a second file, `NAME.data`.
        int8: True: every linear layer becomes an integer product, and embeddings are kept as
            integers; False: none; None: those of the form "int8", and embeddings whose rows are
            on such a grid.
        tolerance: how far outputs may be off, `|onnx - torch| / |torch|`; default 1e-3; 0.03
            where torch computes in half precision; 0.3 with integers, since they round each input
            of a layer as a whole.

    Raises:
        NetworkError: it cannot be exported, or the outputs are farther off.
        RunError: it cannot be written; an older file stays as it was.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    onnx = _import_onnx()
    path = Path(out)
    if path.is_dir():
        raise RunError("cannot write", str(path), "it is a folder", "give a file name")
    inputs = _inputs_of(network)
    plain, weights = _plain(network.module)
    with _quiet():
        proto, names = _export(plain, inputs, network)
        layers = weights_of(plain)
        chosen = dict(layers) if int8 else weights if int8 is None else {}
        known = tables_of(plain).values()
        tables = list(known) if int8 else []
        if int8 is None and chosen:  # where it costs nothing
            tables = [t for t in known if quantized(t).exact]
        proto, count = in_integers(proto, chosen.values(), tables) if chosen else (proto, 0)
    rounds = any(isinstance(m, InputQuantized) for m in network.module.modules())
    wide = any(
        isinstance(m, Half) or any(p.dtype in HALVES for p in m.parameters(False))
        for m in network.module.modules()
    )
    if tolerance is None:
        tolerance = INTEGER_TOLERANCE if count else HALF_TOLERANCE if wide else TOLERANCE
    free = tuple(_free(proto))
    feeds = [inputs, *others(inputs, free)]
    if rounds and any("[0]" in name for name in free):
        feeds.append(varied(inputs))
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        made = _saved(onnx, proto, Path(folder), path.name)
        found = compare(made[0], network, feeds, tolerance, rounds)
        if not found.error <= tolerance:
            raise NetworkError(
                "the ONNX file computes something else", str(path),
                f"in onnxruntime the relative error is {found.error:.2e}, and {tolerance:.0e} is "
                "allowed",
                "allow more with --tolerance" + (", or leave --int8 out" if count else ""),
            )  # fmt: skip
        for part in reversed(made):  # the file that names the other one comes last
            _move(part, path.with_name(part.name))
        size = sum(path.with_name(part.name).stat().st_size for part in made)
    return Written(
        path, size, found.error, found.largest, tolerance, count, len(layers), free,
        tuple(i.name for i in proto.graph.input), names,
        "; ".join(_notes(wide, rounds, found)),
    )  # fmt: skip


def _notes(wide: bool, rounds: bool, found: Compared) -> Iterator[str]:
    if wide:
        yield "half precision was written as float32"
    if rounds:
        yield (
            "layers round what they are given: of a value on the edge between two integers the "
            "last bit decides, there as in torch; "
            f"{found.apart} of {found.samples} samples differed"
            + (f", by a relative error of {found.worst:.2g} at most" if found.apart else "")
        )


def _import_onnx() -> Any:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "ONNX is not installed", "", str(error), "pip install 'lamina[onnx]'"
        ) from None
    return onnx


class Flat(nn.Module):
    """A network that takes its inputs in a row, and returns its floating tensors in a row.

    Args:
        module: the network.
        names: of the inputs, in order; a number is a position.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, named = split(dict(zip(self.names, given, strict=True)))
        return tuple(outputs_of(self.module(*args, **named)).values())


def _inputs_of(network: Network) -> Named:
    """Return the example inputs by name (`0`, `1`, ... by position), with a batch of two."""
    given: dict[str, Any] = {str(i): x for i, x in enumerate(network.example_inputs)}
    given |= network.example_kwargs
    if not given:
        raise NetworkError(
            "nothing to export the network with", network.name, "it has no example inputs",
            "give --skeleton file.py:function, which returns (network, inputs)",
        )  # fmt: skip
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise NetworkError("an input is no tensor", f"{network.name}: {name}", str(type(x)))
    # A batch of one would be taken for a constant.
    return {n: torch.cat([x, x]) if x.dim() and len(x) == 1 else x for n, x in given.items()}


def _plain(module: nn.Module) -> tuple[nn.Module, dict[str, Weight]]:
    """Return a float32 network of layers that exporters know, and the integers of its int8 layers.

    The original's tensors are used wherever they may stay as they are.
    """
    integer = {name: m for name, m in module.named_modules() if isinstance(m, Integer)}
    short = {name: m for name, m in module.named_modules() if isinstance(m, Half)}
    half = any(p.dtype != torch.float32 and p.is_floating_point() for p in module.parameters())
    if not integer and not short and not half:
        return module.eval(), {}
    held = {id(t): t for t in (*module.parameters(), *module.buffers())}
    plain = copy.deepcopy(module, dict(held)).eval()  # a copy of the layers, not of the tensors
    weights = {}
    for name, layer in integer.items():
        integers, scale = layer.integers()
        weights[name] = Weight(integers, scale)
        parent, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, weights[name].layer(layer.bias))
    for name, narrow in short.items():
        parent, _, leaf = name.rpartition(".")
        matrix = (narrow.weight.T if narrow.transposed else narrow.weight).detach()
        rounded = matrix.to(SHORT).float().contiguous()
        setattr(plain.get_submodule(parent), leaf, linear_of(rounded, narrow.bias))
    if half:
        plain = copy.deepcopy(plain).float()
    return plain, weights


def _export(module: nn.Module, inputs: Named, network: Network) -> tuple[Any, tuple[str, ...]]:
    """Return the exported model, and the names of its outputs."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    wide = {n: x.float() if x.is_floating_point() else x for n, x in inputs.items()}
    given = tuple(x.to(device) for x in wide.values())
    with torch.no_grad():
        args, kwargs = split(dict(zip(wide, given, strict=True)))
        names = tuple(outputs_of(module(*args, **kwargs)))
    failed: Exception | None = None
    # Sizes are left free where that works: batch and length, the batch alone, none.
    for most in (2, 1, 0) if network.task else (1, 0):
        shapes = tuple(
            dict.fromkeys(range(_free_dims(x, most)), torch.export.Dim.AUTO) for x in given
        )
        try:
            with _plain_attention(module):
                program = torch.onnx.export(
                    Flat(module, list(inputs)).eval(), given, dynamo=True, verbose=False,
                    input_names=names_of(inputs), output_names=list(names),
                    dynamic_shapes={"given": shapes},
                )  # fmt: skip
            assert program is not None  # without a file it returns one
            return program.model_proto, names
        except Exception as error:  # whatever the exporter meets
            failed = error
    cause: BaseException | None = failed
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    raise NetworkError(
        "the network cannot be exported to ONNX", network.name, one_line(cause or RuntimeError()),
        "torch.onnx.export does not know one of its operations",
    ) from failed  # fmt: skip


def _free_dims(x: torch.Tensor, most: int) -> int:
    """Return how many leading sizes of an input may differ: the batch, and of tokens the length."""
    return min(x.dim(), most, 1 if x.is_floating_point() else 2)


@contextmanager
def _plain_attention(module: Any) -> Iterator[None]:
    """Let a network of transformers multiply and add its attention, instead of calling torch's.

    What torch's becomes in a graph looks for rows without any token, which takes as long as the
    softmax, and views what cannot be viewed at every length.
    """
    kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if kind in (None, "eager") or not hasattr(module, "set_attn_implementation"):
        yield
        return
    try:
        module.set_attn_implementation("eager")
    except Exception:  # a family without it keeps what it has
        kind = None
    try:
        yield
    finally:
        if kind is not None:
            module.set_attn_implementation(kind)


def _free(proto: Any) -> Iterator[str]:
    for value in proto.graph.input:
        for at, size in enumerate(value.type.tensor_type.shape.dim):
            if size.dim_param:
                yield f"{value.name}[{at}]"


def _saved(onnx: Any, proto: Any, folder: Path, name: str) -> list[Path]:
    """Write a model into a folder; return its files, the model first."""
    path, data = folder / name, f"{name}.data"
    if proto.ByteSize() < LIMIT:
        path.write_bytes(proto.SerializeToString())
        return [path]
    onnx.save_model(proto, str(path), save_as_external_data=True, location=data)
    return [path, folder / data]


def _move(part: Path, target: Path) -> None:
    def copy_into(file: Any) -> None:
        with part.open("rb") as opened:
            while block := opened.read(1 << 24):
                file.write(block)

    write_atomic(target, copy_into)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from talking: what matters comes as an error, or is in the result."""
    logger = logging.getLogger("torch.onnx")
    others = [logging.getLogger(n) for n in list(logging.root.manager.loggerDict)
              if n.startswith("torch.onnx")]  # fmt: skip
    before = [(one, one.level) for one in (logger, *others)]
    for one, _ in before:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in before:
            one.setLevel(level)
