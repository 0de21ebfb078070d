from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from lamina.network.layers import describe
from lamina.network.observe import Uses, observe
from lamina.network.source import Network


def uses_of(module: nn.Module, *inputs: object, **kwargs: object) -> Uses:
    sites = []
    for path, part in module.named_modules(remove_duplicate=False):
        parent = module.get_submodule(path.rpartition(".")[0]) if path else None
        sites += describe(path, part, parent)
    uses = observe(Network(module, inputs, kwargs), sites)
    assert isinstance(uses, Uses), uses
    return uses


class Reads(nn.Module):
    """Reads a layer behind its back, in the way it is told."""

    def __init__(self, how) -> None:
        super().__init__()
        self.first, self.fc, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x):
        return self.how(self, self.first(x))


@pytest.mark.parametrize(
    ("module", "shape", "positions"),
    [
        (nn.Linear(3, 2), (5, 3), 1),
        (nn.Linear(3, 2), (5, 7, 3), 7),
        (nn.Conv2d(3, 8, 3, stride=2), (5, 3, 9, 9), 16),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), (5, 4, 6, 6), 36),
        (nn.ConvTranspose2d(3, 8, 4, stride=2), (5, 3, 6, 6), 36),  # at its input positions
        (nn.Conv1d(3, 2, 3), (2, 3, 8), 6),
    ],
)
def test_positions_of_layers(module, shape, positions):
    assert uses_of(nn.Sequential(module), torch.zeros(shape)).positions == {"0.weight": positions}


def test_positions_equal_the_multiplications_counted_by_torch():
    from torch.utils.flop_counter import FlopCounterMode

    for module, shape in [
        (nn.Linear(3, 2), (2, 5, 3)),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 7)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 6)),
    ]:
        net, x = nn.Sequential(module), torch.zeros(shape)
        with FlopCounterMode(display=False) as counter:
            net(x)
        positions = uses_of(net, x).positions["0.weight"]
        assert counter.get_total_flops() == 2 * 2 * positions * module.weight.numel()


def test_positions_of_tables():
    index = torch.zeros(5, 7, dtype=torch.long)
    assert uses_of(nn.Sequential(nn.Embedding(9, 3)), index).positions == {"0.weight": 7}
    assert uses_of(nn.Sequential(nn.EmbeddingBag(9, 3)), index).positions == {"0.weight": 7}


def test_positions_of_recurrent_layers():
    lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True)
    assert set(uses_of(lstm, torch.zeros(2, 6, 3)).positions.values()) == {6.0}
    assert set(uses_of(nn.GRUCell(3, 4), torch.zeros(2, 3)).positions.values()) == {1.0}

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(3, 4)

        def forward(self, a, b):
            return self.rnn(pack_sequence([a[0], b[0]]))[0].data

    uses = uses_of(Packed(), torch.zeros(1, 5, 3), torch.zeros(1, 3, 3))
    assert set(uses.positions.values()) == {8.0}


def test_positions_of_attention_are_those_of_query_key_and_value():
    attn = nn.MultiheadAttention(4, 2, batch_first=True)
    q, kv = torch.zeros(2, 3, 4), torch.zeros(2, 9, 4)
    assert uses_of(attn, q, kv, kv).positions == {"in_proj_weight": 7.0, "out_proj.weight": 3.0}
    assert uses_of(attn, query=q, key=kv, value=kv).positions["in_proj_weight"] == 7.0
    apart = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)
    uses = uses_of(apart, q, torch.zeros(2, 9, 3), torch.zeros(2, 9, 5))
    assert uses.positions["q_proj_weight"] == 3 and uses.positions["v_proj_weight"] == 9


def test_calls_add_up_and_the_uncalled_are_absent():
    net = Reads(lambda self, x: self.first(self.first(x)))
    uses = uses_of(net, torch.zeros(2, 4))
    assert uses.calls == {"first.weight": 3} and uses.positions == {"first.weight": 3}
    assert uses.raw == {}


@pytest.mark.parametrize(
    "how",
    [
        lambda self, x: F.linear(x, self.fc.weight),
        lambda self, x: x @ self.fc.weight.T,
        lambda self, x: x + self.fc.weight.sum(),
        lambda self, x: x + self.fc.bias,
        lambda self, x: self.fc(x.to(self.fc.weight.dtype)),
        lambda self, x: self.fc.forward(x),
    ],
)
def test_raw_reads_are_seen(how):
    uses = uses_of(Reads(how), torch.zeros(2, 4))
    assert uses.raw == {"fc.weight": "the network itself"}


@pytest.mark.parametrize(
    "how",
    [
        lambda self, x: self.fc(x),
        lambda self, x: self.fc(x.to(next(self.parameters()).device)),
        lambda self, x: self.fc(x) * self.fc.in_features,
    ],
)
def test_harmless_reads_are_not_raw(how):
    assert uses_of(Reads(how), torch.zeros(2, 4)).raw == {}


def test_raw_linear_reads_count_positions():
    net = Reads(lambda self, x: F.linear(self.fc(x), self.fc.weight))
    assert uses_of(net, torch.zeros(2, 5, 4)).positions["fc.weight"] == 10


def test_a_hook_that_touches_the_weight_is_a_raw_read():
    net = Reads(lambda self, x: self.fc(x))
    net.fc.register_forward_hook(lambda module, args, output: output + module.weight.sum())
    net.first.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert set(uses_of(net, torch.zeros(2, 4)).raw) == {"fc.weight"}


def test_input_sizes_of_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(2), nn.Conv1d(4, 2, 1))
    uses = uses_of(net, torch.zeros(2, 3, 9, 7))
    assert uses.extents == {"0.weight": {(9, 7)}, "2.weight": {(12,)}}
    assert uses_of(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(3, 9, 7)).extents == {
        "0.weight": {(9, 7)}  # without a batch
    }

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(input=self.conv(x))

    assert uses_of(Pyramid(), torch.zeros(2, 3, 9, 9)).extents == {"conv.weight": {(9, 9), (7, 7)}}
    assert uses_of(nn.Linear(3, 2), torch.zeros(2, 3)).extents == {}


def test_failure_is_a_reason():
    reason = observe(Network(nn.Linear(3, 3), (torch.zeros(2, 5),)), [])
    assert isinstance(reason, str) and "shapes cannot be multiplied" in reason
    assert "no example inputs" in str(observe(Network(nn.Linear(3, 3)), []))
