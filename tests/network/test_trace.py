from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.network.tiny import Branching, Mlp, Residual
from torch import nn

from lamina.network.source import Network
from lamina.network.trace import Flow, trace


def flow_of(module: nn.Module, *inputs: torch.Tensor, **kwargs: torch.Tensor) -> Flow:
    flow = trace(Network(module, inputs, kwargs))
    assert isinstance(flow, Flow), flow
    return flow


def test_ops_say_target_module_inputs_params_and_shape():
    flow = flow_of(Mlp(), torch.zeros(2, 6))
    assert [op.target for op in flow.ops] == ["linear", "relu", "linear", "relu", "linear"]
    assert [op.module for op in flow.ops] == ["fc1", "", "fc2", "", "fc3"]
    assert flow.ops[2].params == ("fc2.weight", "fc2.bias")
    assert [op.shape for op in flow.ops] == [(2, 5), (2, 5), (2, 4), (2, 4), (2, 3)]
    assert flow.ops[0].inputs == flow.inputs and len(flow.inputs) == 1
    assert flow.ops[1].inputs == (flow.ops[0].name,)
    assert flow.outputs == (flow.ops[-1].name,)


def test_buffers_are_params_of_their_op_and_the_residual_has_two_inputs():
    flow = flow_of(Residual(), torch.zeros(2, 1, 8, 8))
    norm = next(op for op in flow.ops if op.module == "bn")
    assert norm.params == ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    add = next(op for op in flow.ops if op.target == "add")
    assert len(add.inputs) == 2 and add.params == ()


def test_in_place_ops_are_named_alike_and_flow_on():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = self.a(x)
            F.relu_(x)
            return self.b(x)

    flow = flow_of(InPlace(), torch.zeros(1, 3))
    assert [op.target for op in flow.ops] == ["linear", "relu", "linear"]
    assert flow.ops[2].inputs == (flow.ops[1].name,)


def test_keyword_inputs():
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, ids=None, mask=None):
            return self.fc(ids) * mask

    flow = flow_of(Keywords(), ids=torch.zeros(1, 3), mask=torch.ones(1, 3))
    assert [op.target for op in flow.ops] == ["linear", "mul"] and len(flow.inputs) == 2


def test_failure_is_one_line_and_silent(capfd):
    reason = trace(Network(Branching(), (torch.zeros(2, 4),)))
    assert isinstance(reason, str) and "torch.export failed" in reason and "\n" not in reason
    assert len(reason) < 250
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_without_example_inputs():
    reason = trace(Network(Mlp()))
    assert isinstance(reason, str) and "no example inputs" in reason
