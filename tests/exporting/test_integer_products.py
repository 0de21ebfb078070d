"""Integer products in ONNX graphs, against their definition written in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from lamina.exporting.integer_products import Weight, in_integers, quantized, weights_of  # noqa: E402
from lamina.forms.integer import grid_of  # noqa: E402


def graph_of(first: np.ndarray, second: np.ndarray, bias: np.ndarray) -> Any:
    """x -> a = x first; b = x first_copy + a; y = Gemm(a, second^T, bias)."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["x", "other"], ["b"]),
        helper.make_node("Gemm", ["a", "v", "c"], ["y"], transB=1),
    ]
    kept = [
        numpy_helper.from_array(array, name)
        for name, array in (("w", first), ("other", first * 2 + 1), ("v", second), ("c", bias))
    ]
    shapes = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", first.shape[0]])]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", n]) for n in "aby"]
    graph = helper.make_graph(nodes, "g", shapes, outputs, kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def by_hand(x: np.ndarray, weight: Weight) -> np.ndarray:
    """The definition of DynamicQuantizeLinear and MatMulInteger, in float64."""
    low, high = min(0.0, x.min()), max(0.0, x.max())
    step = np.float32((np.float32(high) - np.float32(low)) / np.float32(255))
    zero = np.clip(np.rint(-low / step), 0, 255)
    q = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    sums = q.astype(np.int64) @ weight.integers.numpy().astype(np.int64).T
    return sums * float(step) * weight.scale.numpy().astype(np.float64)


def run(proto: Any, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})


def test_layers_multiply_integers_as_the_standard_says() -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((16, 8)).astype(np.float32)
    second = rng.standard_normal((4, 8)).astype(np.float32)
    bias = rng.standard_normal(4).astype(np.float32)
    x = rng.standard_normal((5, 16)).astype(np.float32)
    exact = run(graph_of(first, second, bias), x)
    weights = [torch.from_numpy(first.T.copy()), torch.from_numpy(second)]
    proto, count = in_integers(graph_of(first, second, bias), weights)
    onnx.checker.check_model(proto)
    assert count == 2  # the third is another weight
    kinds = [n.op_type for n in proto.graph.node]
    assert kinds.count("MatMul") == 1 and "Gemm" not in kinds
    assert kinds.count("DynamicQuantizeLinear") == 2  # of x once, of a once
    assert {i.name for i in proto.graph.initializer} >= {"other", "c"}
    assert not {"w", "v"} & {i.name for i in proto.graph.initializer}
    a, b, y = run(proto, x)
    np.testing.assert_allclose(a, by_hand(x, quantized(weights[0])), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, by_hand(a, quantized(weights[1])) + bias, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(b, exact[1])
    assert 1e-4 < np.abs(a - exact[0]).max() < 0.2


def test_weights_on_a_grid_keep_their_integers_exactly() -> None:
    weight = grid_of(torch.randn(8, 16)).dense()
    made = quantized(weight)
    assert torch.equal(made.integers.float() * made.scale[:, None], weight)
    uneven = torch.randint(-90, 90, (4, 9)).float() * torch.tensor([[0.3], [0.7], [0.11], [1.9]])
    uneven[:, 0] = uneven[:, 0].abs().clamp(min=1e-9) * 0 + torch.tensor([0.3, 0.7, 0.11, 1.9])
    made = quantized(uneven)
    back = made.integers.float() * made.scale[:, None]
    torch.testing.assert_close(back, uneven, rtol=1e-5, atol=1e-6)


def test_other_weights_are_rounded_to_the_nearest_of_255_values() -> None:
    weight = torch.randn(6, 40)
    made = quantized(weight)
    assert made.integers.dtype == torch.int8 and int(made.integers.abs().max()) == 127
    away = (made.integers.float() * made.scale[:, None] - weight).abs()
    assert bool((away <= made.scale[:, None] * 0.5001).all())
    assert torch.equal(quantized(torch.zeros(2, 3)).integers, torch.zeros(2, 3, dtype=torch.int8))


def test_the_weights_of_linear_layers_are_found_and_no_others() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf = 3
            self.weight = nn.Parameter(torch.randn(2, 3))

    net = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Embedding(4, 2), "c": Conv1D()})
    found = weights_of(net)
    assert {name: tuple(w.shape) for name, w in found.items()} == {"a": (3, 2), "c": (3, 2)}


def test_tables_are_looked_up_as_integers() -> None:
    table = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    nodes = [helper.make_node("Gather", ["t", "ids"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 4])],
        [numpy_helper.from_array(table, "t")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    proto, count = in_integers(proto, [], [torch.from_numpy(table)])
    assert count == 0 and {i.data_type for i in proto.graph.initializer} == {
        TensorProto.INT8, TensorProto.FLOAT,
    }  # fmt: skip
    ids = np.array([[0, 8, 3], [2, 2, 1]])
    session = ort.InferenceSession(proto.SerializeToString())
    found = session.run(None, {"ids": ids})[0]
    made = quantized(torch.from_numpy(table))
    wanted = (made.integers.float() * made.scale[:, None]).numpy()[ids]
    np.testing.assert_array_equal(found, wanted)


def test_products_with_other_settings_are_left_alone() -> None:
    weight = np.ones((4, 8), np.float32)
    node = helper.make_node("Gemm", ["x", "v"], ["y"], transB=1, alpha=2.0)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "v")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert in_integers(proto, [torch.from_numpy(weight)])[1] == 0
