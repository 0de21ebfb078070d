from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lamina.errors import NetworkError
from lamina.network.load import check_network, check_runs, open_network
from lamina.network.source import Network

FILE = """
import torch
from dataclasses import dataclass
from torch import nn
from neighbour import WIDTH

@dataclass
class Settings:
    width: int = WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, Settings().width)
    def forward(self, x):
        return self.fc(x)

def build():
    return Net()

def pair():
    return Net(), torch.zeros(2, 3)

def fails():
    raise KeyError("weights.pt")

def number():
    return 3

def needs(width):
    return Net()

def network():
    from lamina.network.source import Network
    return Network(Net(), (torch.zeros(1, 3),), name="mine")

def leaves():
    raise SystemExit(1)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    (tmp_path / "net.py").write_text(FILE)
    yield tmp_path / "net.py"
    sys.modules.pop("neighbour", None)


def test_module_tensor_tuple_mapping_and_network():
    x, module = torch.zeros(1, 3), nn.Linear(3, 2)
    assert open_network(module) == Network(module, name="Linear")
    assert open_network(module, x).example_inputs == (x,)
    assert open_network(module, (x, 1)).example_inputs == (x, 1)
    assert open_network(module, {"input": x}).example_kwargs == {"input": x}
    network = open_network(Network(module, (x,), source="zoo:x"), name="own")
    assert (network.name, network.source, network.example_inputs) == ("own", "zoo:x", (x,))


def test_functions_of_a_file(file):
    path = list(sys.path)
    network = open_network(f"{file}:build")
    assert (network.name, network.source) == ("net", f"python:{file}:build")
    assert network.module.fc.out_features == 5 and network.example_inputs == ()
    assert open_network(f"{file}:pair").example_inputs[0].shape == (2, 3)
    assert open_network(f"{file}:Net").module.fc.in_features == 3
    assert open_network(f"{file}:network").name == "mine"
    assert open_network(f"{file}:network").source == f"python:{file}:network"
    assert sys.path == path and "net" not in sys.modules


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("nope", ["no function 'nope'", "Settings, Net, build, pair"]),
        ("fails", ["raised an error", "KeyError: 'weights.pt'", "line 25"]),
        ("leaves", ["raised an error", "SystemExit"]),
        ("number", ["returned no network", "int"]),
        ("needs", ["needs arguments", "width"]),
    ],
)
def test_functions_that_give_no_network(file, function, says):
    with pytest.raises(NetworkError) as error:
        open_network(f"{file}:{function}")
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in says), line


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("missing.py:build", "no such file at missing.py"),
        ("lenet-999", "no such name"),
        (3, "not an nn.Module"),
        (nn.Linear, "not an nn.Module"),
    ],
)
def test_what_cannot_be_opened(model, says):
    with pytest.raises(NetworkError, match=says):
        open_network(model)


def test_files_that_fail_to_import(tmp_path):
    before = set(sys.modules)
    for text, says in [("def (", "SyntaxError"), ("import nothing_of_this_name", "ModuleNotFound")]:
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(NetworkError, match=f"{says}.*line 1"):
            open_network(f"{tmp_path}/bad.py:build")
    (tmp_path / "bad.py").write_text("x = 1\n\ndef one(): pass\n")
    with pytest.raises(NetworkError, match="it has one"):
        open_network(f"{tmp_path}/bad.py")
    assert not {m for m in set(sys.modules) - before if "bad" in m}


def test_a_compiled_module_is_unwrapped():
    module = nn.Sequential(nn.Linear(3, 2))
    assert open_network(torch.compile(module, backend="eager")).module is module


def test_good_networks_pass(file):
    check_network(open_network(nn.Linear(3, 2)))
    check_network(open_network(f"{file}:pair"))

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0))
            self.register_buffer("mask", torch.full((2,), float("-inf")))

        def forward(self, x):
            return {"label": x.argmax(-1), "scores": x * self.scale}

    network = open_network(Odd(), torch.ones(2, 3))
    check_network(network)
    assert torch.equal(check_runs(network), torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("0.weight", float("nan"), r"1 of 6 values are not finite at 0.weight \(2, 3\)"),
        ("1.bias", float("-inf"), r"1 of 2 values are not finite at 1.bias"),
        ("1.running_mean", float("nan"), r"not finite at 1.running_mean"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_values_are_named(name, value, says, dtype):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    net.state_dict()[name].view(-1)[0] = value
    with pytest.raises(NetworkError, match=says):
        check_network(Network(net))


@pytest.mark.parametrize(
    ("module", "inputs", "says"),
    [
        (nn.ReLU(), torch.zeros(1), "has no parameters"),
        (nn.LazyLinear(3), torch.zeros(1, 2), "uninitialised at weight"),
        (nn.Linear(3, 2, device="meta"), torch.zeros(1, 3), "no values at weight"),
        (nn.Linear(3, 2), torch.zeros(1, 4), r"fails on its example inputs at inputs \(1, 4\)"),
        (nn.Linear(3, 2), torch.full((1, 3), float("nan")), "2 of 2 outputs are not finite"),
    ],
)
def test_networks_that_cannot_be_worked_on(module, inputs, says):
    with pytest.raises(NetworkError, match=says) as error:
        check_network(open_network(module, inputs))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("output", [3, "text", None, [1, 2], (), torch.zeros(1, dtype=torch.long)])
def test_outputs_that_are_no_scores(output):
    class Says(nn.Linear):
        def forward(self, x):
            return output

    with pytest.raises(NetworkError, match=r"returned no tensor|returns no floating tensor"):
        check_network(open_network(Says(3, 2), torch.zeros(1, 3)))


def test_check_runs_explains_missing_inputs():
    with pytest.raises(NetworkError, match=r"no example inputs.*give example_inputs"):
        check_runs(open_network(nn.Linear(3, 2)))
