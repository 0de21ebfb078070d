"""Linear layers of an ONNX graph as integer products, in the operations onnxruntime fuses.

`x W` becomes `DynamicQuantizeLinear(x)`, `MatMulInteger` and one multiplication by both scales. An
input that several layers read is quantized once. Tables of embeddings are kept as integers with a
scale per row, and multiplied once looked up. Both are found by their values: exporters transpose
and rename weights, but do not change them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lamina.forms.integer import round_weight
from lamina.forms.low_rank import GroupedLinear

MOST = 127
SMALL = 1 << 16  # elements; a smaller table costs more time as integers than it saves room


@dataclass(frozen=True)
class Weight:
    """The weight of a linear layer in integers.

    Args:
        integers: int8 `[out, in]`.
        scale: float32 `[out]`.
        values: float32 `[out, in]`, what the graph holds; None: integers times scale.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    values: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """Return the values that the graph holds."""
        if self.values is not None:
            return self.values
        return self.integers.float() * self.scale[:, None]

    @property
    def exact(self) -> bool:
        """Whether the integers give the values back, but for the last bit."""
        away = (self.integers.float() * self.scale[:, None] - self.dense()).abs().amax(1)
        return bool((away <= 1e-6 * self.dense().abs().amax(1)).all())

    def layer(self, bias: torch.Tensor | None) -> nn.Linear:
        """Return a Linear of these values."""
        return linear_of(self.dense(), bias)


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a Linear of a weight, float32 `[out, in]`."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return made.eval()


def quantized(weight: torch.Tensor) -> Weight:
    """Return a matrix in integers: those it is made of where its rows lie on a grid of at most
    255 values, else the nearest ones with the row's largest at 127.

    Args:
        weight: float32 `[out, in]`.

    Example:
        >>> made = quantized(torch.tensor([[0.5, -1.0, 0.25]]))
        >>> made.integers.tolist(), made.scale.tolist()
        ([[2, -4, 1]], [0.25])
    """
    weight = weight.detach().float().contiguous()
    integers, scale = round_weight(weight)
    exact = (integers * scale[:, None] - weight).abs().amax(1) <= 1e-5 * weight.abs().amax(1)
    nearest = (weight.abs().amax(1) / MOST).clamp(min=1e-30)
    scale = torch.where(exact, scale, nearest)
    integers = torch.round(weight / scale[:, None]).clamp(-MOST, MOST)
    return Weight(integers.to(torch.int8), scale, weight)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of all linear layers, `[out, in]`, by module."""
    found = {}
    for name, layer in module.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or weight.dim() != 2 or isinstance(layer, (nn.Embedding, GroupedLinear)):
            continue
        kinds = {kind.__name__ for kind in type(layer).__mro__}
        if "Linear" in kinds:
            found[name] = weight
        elif "Conv1D" in kinds:
            found[name] = weight.T
    return found


def tables_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tables of embeddings, `[rows, width]`, by module; small ones are left out."""
    found = {n: m.weight for n, m in module.named_modules() if type(m) is nn.Embedding}
    return {name: weight for name, weight in found.items() if weight.numel() >= SMALL}


def in_integers(
    proto: Any, weights: Iterable[Weight | torch.Tensor], tables: Iterable[torch.Tensor] = ()
) -> tuple[Any, int]:
    """Return an ONNX model in which linear layers multiply integers, and how many do.

    Args:
        proto: the model; it is changed.
        weights: of the layers; of floats, integers are made here.
        tables: of embeddings.
    """
    proto, count = _products(proto, weights)
    return _lookups(proto, tables), count


def _products(proto: Any, weights: Iterable[Weight | torch.Tensor]) -> tuple[Any, int]:
    from onnx import TensorProto, helper, numpy_helper

    wanted: dict[bytes, Weight | torch.Tensor] = {}
    for weight in weights:
        values = weight.dense() if isinstance(weight, Weight) else weight.detach().float()
        wanted.setdefault(_digest(values.cpu().numpy()), weight)
    graph = proto.graph
    stored = {i.name: i for i in graph.initializer}
    nodes, more, inputs, made, count = [], [], {}, {}, 0
    for node in graph.node:
        held = _held(node, stored, wanted, numpy_helper)
        if held is None:
            nodes.append(node)
            continue
        x, name, weight = node.input[0], node.input[1], held
        if x not in inputs:
            inputs[x] = tuple(f"{x}.{part}" for part in ("integers", "step", "zero"))
            nodes.append(helper.make_node("DynamicQuantizeLinear", [x], list(inputs[x])))
        integers, step, zero = inputs[x]
        if name not in made:
            made[name] = tuple(f"{name}.{part}" for part in ("integers", "step", "zero"))
            weight = weight if isinstance(weight, Weight) else quantized(weight)
            matrix = np.ascontiguousarray(weight.integers.cpu().numpy().T)
            more += [
                numpy_helper.from_array(matrix, made[name][0]),
                numpy_helper.from_array(weight.scale.float().cpu().numpy(), made[name][1]),
                numpy_helper.from_array(np.zeros((), np.int8), made[name][2]),
            ]
        own, scale, none = made[name]
        y = node.output[0]
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        product = f"{y}.product" if bias else y
        nodes += [
            helper.make_node("MatMulInteger", [integers, own, zero, none], [f"{y}.sums"]),
            helper.make_node("Cast", [f"{y}.sums"], [f"{y}.floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [step, scale], [f"{y}.steps"]),
            helper.make_node("Mul", [f"{y}.floats", f"{y}.steps"], [product]),
        ]
        if bias:
            nodes.append(helper.make_node("Add", [product, bias], [y]))
        count += 1
    _replace(graph, nodes, more)
    return proto, count


def _lookups(proto: Any, tables: Iterable[torch.Tensor]) -> Any:
    """Look up integers and their scales, instead of floats."""
    from onnx import TensorProto, helper, numpy_helper

    wanted = {_digest(t.detach().float().cpu().numpy()): t for t in tables}
    if not wanted:
        return proto
    graph = proto.graph
    stored = {i.name: i for i in graph.initializer}
    nodes: list[Any] = []
    more: dict[str, Any] = {}
    for node in graph.node:
        name = node.input[0] if node.op_type == "Gather" else ""
        table = None
        if name in stored and not any(a.name == "axis" and a.i for a in node.attribute):
            array = numpy_helper.to_array(stored[name])
            if array.ndim == 2 and array.dtype == np.float32:
                table = wanted.get(_digest(array))
        if table is None:
            nodes.append(node)
            continue
        own, step = f"{name}.rows", f"{name}.steps"
        if own not in more:
            weight = quantized(table)
            more[own] = numpy_helper.from_array(weight.integers.cpu().numpy(), own)
            more[step] = numpy_helper.from_array(weight.scale[:, None].float().cpu().numpy(), step)
        y, ids = node.output[0], node.input[1]
        nodes += [
            helper.make_node("Gather", [own, ids], [f"{y}.integers"]),
            helper.make_node("Cast", [f"{y}.integers"], [f"{y}.floats"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [step, ids], [f"{y}.step"]),
            helper.make_node("Mul", [f"{y}.floats", f"{y}.step"], [y]),
        ]
    _replace(graph, nodes, more.values())
    return proto


def _replace(graph: Any, nodes: Iterable[Any], more: Iterable[Any]) -> None:
    """Give a graph other nodes, drop the values that none of them reads, and add some."""
    nodes = list(nodes)
    used = {name for node in nodes for name in node.input} | {o.name for o in graph.output}
    kept = [i for i in graph.initializer if i.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *more])


def _held(node: Any, stored: Any, wanted: Any, numpy_helper: Any) -> Any:
    """Return the wanted weight that a node multiplies by, or None."""
    if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in stored:
        return None
    given = {a.name: a for a in node.attribute}
    flip = "transB" in given and given["transB"].i == 1
    plain = all(a.f == 1.0 for n, a in given.items() if n in ("alpha", "beta"))
    if not plain or ("transA" in given and given["transA"].i):
        return None
    array = numpy_helper.to_array(stored[node.input[1]])
    if array.ndim != 2 or array.dtype != np.float32:
        return None
    return wanted.get(_digest(array if flip else array.T))


def _digest(array: np.ndarray) -> bytes:
    told = f"{array.shape}".encode()
    return hashlib.sha256(told + np.ascontiguousarray(array, np.float32).tobytes()).digest()
