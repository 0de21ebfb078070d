"""Lossless: any network comes back bit for bit, smaller; what would change it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.own import write_net
from torch import nn

import lamina
from lamina import artifact, cli
from lamina.artifact import unpack
from lamina.errors import BudgetError, FileError, InfeasibleError, LaminaError
from lamina.forms import Sparse
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.plan import Plan
from lamina.plan.lossless import check_bits, keep_all


class Odd(nn.Module):
    """Ties, many dtypes, special values, zeros of both signs, buffers of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 64, bias=False)
        self.tied = nn.Linear(64, 96, bias=False)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(96)
        self.narrow = nn.Parameter(torch.randn(33, 7).half())
        self.brain = nn.Parameter(torch.randn(500).bfloat16() * 0.1)
        self.wide = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        self.register_buffer("ids", torch.arange(512)[None])
        self.register_buffer("mask", torch.ones(32, 32).tril().bool())
        self.register_buffer("small", torch.randint(0, 255, (77,), dtype=torch.uint8))
        self.register_buffer("wave", torch.randn(9, dtype=torch.complex64))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(-0.0))
        with torch.no_grad():
            weight = self.second.weight
            weight[torch.rand(weight.shape) < 0.8] = 0.0
            weight[0, :3] = torch.tensor([-0.0, float("nan"), float("-inf")])
            weight.view(torch.int32)[1, 0] = 0x7FA12345  # a signalling NaN with a payload
            weight[1, 1] = 1e-42  # denormal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.contiguous().reshape(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes()


def state(module: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: bits(tensor) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_bit_comes_back_and_the_file_is_smaller(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 10)).to(dtype)
    before = state(net)
    result = lamina.compress(net, lossless=True)
    assert state(result.model) == before
    assert result.model is not net
    blank = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 10)).to(dtype)
    back = artifact.restore(unpack(result.file), blank)
    assert state(back) == before
    most = {torch.float32: 0.87, torch.float64: 0.7, torch.bfloat16: 0.72, torch.float16: 0.95}
    assert len(result.file) < most[dtype] * result.report.facts["size"]["original"]


def test_an_odd_network_comes_back_bit_for_bit() -> None:
    net = Odd()
    before = state(net)
    plan, edited, file = keep_all(Network(net), discover(Network(net)))
    assert state(edited.model) == before
    assert state(net) == before
    package = unpack(file)
    assert isinstance(package.tensors["second.weight"], Sparse)
    back = artifact.restore(package, Odd())
    assert state(back) == before
    assert back.tied.weight is back.first.weight
    assert plan.predicted.bits == 8 * len(file) == 8 * sum(package.ledger.values())
    assert Plan.from_dict(json.loads(json.dumps(plan.dict()))).predicted == plan.predicted


def test_zeros_apart_are_smaller() -> None:  # control: the same without the pattern
    net = Odd()
    _, _, file = keep_all(Network(net), discover(Network(net)))
    assert len(file) < len(artifact.pack(net, (), "module", {}))


def test_what_does_not_come_back_is_never_written() -> None:
    net = nn.Linear(5, 4)
    package = unpack(artifact.pack(net, (), "module", {}))
    check_bits(Network(net), package)
    with torch.no_grad():
        net.bias[2] = torch.nextafter(net.bias[2], torch.tensor(9.0))
    with pytest.raises(FileError, match=r"bias"):
        check_bits(Network(net), package)


def test_the_report_says_lossless_and_nothing_is_lost() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    x = torch.randn(128, 16)
    data = {"calibration": [(x, x[:, :4].argmax(1))], "validation": [(x, x[:, :4].argmax(1))]}
    result = lamina.compress(net, data, lossless=True)
    facts = result.report.facts
    assert facts["quality"]["validation"]["drop"] == 0
    assert facts["error"]["measured"] == 0
    assert facts["budget"] == {"text": "none: lossless", "limits": {}, "met": {}}
    assert {row["chain"] for row in facts["sites"]} == {"keep()"}
    assert any("bit for bit" in note for note in facts["notes"])
    assert facts["recovery"] is None
    shown = result.report.table()
    assert "lossless" in shown
    assert f"{len(result.file):,}" in shown


def test_a_size_is_checked_and_nothing_else_can_be_asked() -> None:
    net = nn.Linear(100, 50)
    size = len(lamina.compress(net, lossless=True).file)
    result = lamina.compress(net, budget=size, lossless=True)
    assert result.report.facts["budget"]["met"] == {"bytes": True}
    with pytest.raises(InfeasibleError, match=f"size={size}") as caught:
        lamina.compress(net, budget="50%", lossless=True)
    assert caught.value.nearest == {"bytes": size}
    for budget in ("macs=50%", "size=50%, max_drop=1", {"params": "2x"}):
        with pytest.raises(BudgetError, match="does not go with lossless"):
            lamina.compress(net, budget=budget, lossless=True)


@pytest.mark.parametrize(
    "said", [{"methods": ["rdoq"]}, {"recover": 3}, {"recipe": "deep-compression"}]
)
def test_what_would_change_the_network_is_refused(said: dict[str, object]) -> None:
    with pytest.raises(BudgetError) as caught:
        lamina.compress(nn.Linear(4, 4), lossless=True, **said)
    assert next(iter(said)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_is_refused() -> None:
    net = Network(nn.Linear(4, 4))
    plan, _, _ = keep_all(net, discover(net))
    with pytest.raises(LaminaError, match="plan does not go with lossless"):
        lamina.compress(net, plan=plan, lossless=True)
    assert replace(plan, sites={}).sites == {}


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_net(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compress", "net.py:build", "--lossless", "-o", "run"]) == 0
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    size = (tmp_path / "run" / "net.lamina").stat().st_size
    assert facts["size"]["file"] == size
    assert facts["size"]["ratio"] == facts["size"]["original"] / size
    for said in (f"{size:,} bytes", f"{int(facts['size']['original']):,} bytes", "lossless"):
        assert said in printed
    assert cli.main(["compress", "net.py:build", "--lossless", "--macs", "50%"]) == 2
    wrong = capsys.readouterr().err
    assert wrong.count("\n") == 1
    assert "macs does not go with lossless" in wrong
    assert cli.main(["compress", "net.py:build"]) == 2  # control: otherwise a budget is needed
