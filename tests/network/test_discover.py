from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.network.tiny import Branching, Gpt, Mlp, Residual, Twice
from torch import nn
from torch.nn.utils import parametrizations, prune

from lamina.network.discover import discover
from lamina.network.sites import Site, Sites
from lamina.network.source import Network


def sites_of(module: nn.Module, *inputs: object) -> Sites:
    sites = discover(Network(module, inputs))
    check_partition(module, sites)
    return sites


def check_partition(module: nn.Module, sites: Sites) -> None:
    """Every tensor of the state dict is claimed once: by a site, an alias, or the rest."""
    state = module.state_dict(keep_vars=True)
    claimed = [n for s in sites.layers for n in (s.weight, s.bias, *s.aliases) if n] + [*sites.rest]
    assert len(claimed) == len(set(claimed)) and set(claimed) <= set(state)
    held = {id(state[name]) for name in claimed}
    assert {id(tensor) for tensor in state.values()} == held
    order = list(state)
    assert sorted(sites.rest, key=order.index) == list(sites.rest)
    assert len({s.name for s in (*sites.layers, *sites.chains)}) == len(sites.layers + sites.chains)
    for site in sites.layers:
        assert site.shape == tuple(state[site.weight].shape)


def names(sites: Sites) -> list[str]:
    return [site.name for site in sites.layers]


def why(sites: Sites, where: str) -> str:
    return next(r.why for r in sites.refusals if r.where == where)


def test_mlp():
    sites = sites_of(Mlp(), torch.zeros(2, 6))
    assert names(sites) == ["fc1", "fc2", "fc3"] and sites.traced
    assert (sites.refusals, sites.rest) == ((), ())
    assert all(s.rigid == "" and s.positions == 1 for s in sites.layers)


def test_residual_network_leaves_its_norms_to_the_rest():
    sites = sites_of(Residual(), torch.zeros(2, 1, 8, 8))
    assert names(sites) == ["stem", "conv1", "conv2", "tail", "fc"]
    assert len(sites.rest) == 15 and sites.rest[0] == "bn.weight"
    assert "bn.num_batches_tracked" in sites.rest
    assert sites["conv1"].positions == 64 and sites["fc"].positions == 1


def test_tied_embedding_and_head_are_one_site():
    module = Gpt()
    sites = sites_of(module, torch.zeros(2, 4, dtype=torch.long))
    head = sites["head"]
    assert head.aliases == ("wte.weight",) and head.rigid == "tied with wte.weight"
    assert (head.op, head.positions) == ("linear", 4)  # the look-up multiplies nothing
    assert names(sites) == ["head", "qkv", "proj", "up", "down"]
    assert sites.chains[0].members == ("up", "down")
    assert "losslessly" in why(sites, "pos")
    assert "wte.weight" not in sites.rest


def test_tied_embeddings_add_up():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(5, 3), nn.Embedding(5, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x) + self.b(x)

    (site,) = sites_of(Two(), torch.zeros(2, 4, dtype=torch.long)).layers
    assert (site.name, site.positions, site.macs) == ("a", 8, 0)


def test_called_twice_shared_and_never_called():
    sites = sites_of(Twice(), torch.zeros(2, 4))
    assert names(sites) == ["a", "shared", "never"]
    assert sites["a"].positions == 2 and sites["a"].rigid == ""
    assert sites["shared"].positions == 2
    assert sites["shared"].aliases == ("same.weight",) and "tied" in sites["shared"].rigid
    assert sites["never"].positions == 0
    assert why(sites, "never") == "never called by the example inputs"


def test_a_repeated_block_may_be_replaced_in_its_one_place():
    block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    sites = sites_of(nn.Sequential(*[block] * 3), torch.zeros(2, 3))
    assert names(sites) == ["0.0"] and sites["0.0"].positions == 3
    assert sites["0.0"].aliases == ("1.0.weight", "2.0.weight") and sites["0.0"].rigid == ""


def test_a_tied_bias_belongs_to_nobody():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].bias = net[0].bias
    sites = sites_of(net, torch.zeros(2, 3))
    assert [s.bias for s in sites.layers] == ["", ""] and sites.rest == ("0.bias",)
    assert all("bias" in s.rigid for s in sites.layers)


def test_overlapping_memory_is_refused():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = nn.Parameter(net[0].weight.data.t())
    sites = sites_of(net, torch.zeros(2, 3))
    assert sites.layers == () and sites.rest == ("0.weight", "1.weight")
    assert "memory with 0.weight" in why(sites, "1")


def test_transformer_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    sites = sites_of(net, torch.zeros(2, 5, 8))
    assert names(sites)[:4] == [
        "layers.0.self_attn.in_proj_weight",
        "layers.0.self_attn.out_proj",
        "layers.0.linear1",
        "layers.0.linear2",
    ]
    assert all(s.rigid and s.positions == 5 for s in sites.layers)
    assert len(sites.chains) == 2 and sites.chains[0].between == (("relu", "dropout"),)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent(kind):
    sites = sites_of(nn.Sequential(kind(3, 4, 2, batch_first=True)), torch.zeros(2, 6, 3))
    assert len(sites.layers) == 4 and sites.rest == () and sites.chains == ()
    assert all(s.op == "recurrent" and s.positions == 6 and s.bias for s in sites.layers)


def test_data_dependent_control_flow_falls_back_to_hooks():
    sites = sites_of(Branching(), torch.zeros(2, 3, 4))
    assert not sites.traced and sites.chains == ()
    assert [(s.name, s.positions, s.rigid) for s in sites.layers] == [("a", 3, ""), ("b", 3, "")]
    (refusal,) = sites.refusals
    assert refusal.where == "chains" and "torch.export failed" in refusal.why


def test_without_example_inputs_there_is_one_refusal():
    sites = sites_of(Mlp())
    assert names(sites) == ["fc1", "fc2", "fc3"] and not sites.traced
    assert [r.where for r in sites.refusals] == ["chains"]
    assert sites["fc1"].positions == 1


def test_a_network_that_does_not_run_still_has_layers():
    sites = sites_of(Mlp(), torch.zeros(2, 7))
    assert names(sites) == ["fc1", "fc2", "fc3"]
    assert [r.where for r in sites.refusals] == ["chains", "positions"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old weight_norm says it is old
@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ],
)
def test_computed_weights_are_refused_by_name(norm):
    net = nn.Sequential(nn.Linear(3, 3), norm(nn.Linear(3, 3)))
    sites = sites_of(net, torch.zeros(2, 3))
    assert names(sites) == ["0"] and "computed" in why(sites, "1.weight")
    assert [r.where for r in sites.refusals] == ["1.weight"]
    assert set(sites.rest) == {n for n in net.state_dict() if n.startswith("1.")}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_recurrent_weights():
    net = torch.nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    sites = sites_of(net, torch.zeros(5, 2, 3))
    assert names(sites) == ["weight_ih_l0"] and "computed" in why(sites, "weight_hh_l0")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(3, 3, dtype=torch.int8), "dtype is int8"),
        (torch.zeros(3, 3, dtype=torch.complex64), "dtype is complex64"),
        (torch.eye(3).to_sparse(), "layout is sparse_coo"),
        (torch.zeros(3, 3, device="meta"), "meta"),
    ],
)
def test_weights_that_cannot_be_compressed(weight, reason):
    net = nn.Sequential(nn.Linear(3, 3, bias=False))
    net[0].weight = nn.Parameter(weight, requires_grad=False)
    sites = sites_of(net)
    assert sites.layers == () and sites.rest == ("0.weight",) and reason in why(sites, "0")
    assert len(sites.refusals) == 2


def test_lazy_modules():
    net = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4), nn.LazyConv2d(2, 3))
    sites = discover(Network(net, (torch.zeros(2, 3),)))
    assert names(sites) == ["0"] and sites.rest == ()
    assert "uninitialised" in why(sites, "1") and "uninitialised" in why(sites, "2")
    assert isinstance(net[1].weight, nn.UninitializedParameter)  # the run did not make them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    sites = sites_of(Mlp().to(dtype), torch.zeros(2, 6, dtype=dtype))
    assert len(sites.layers) == 3 and len(sites.chains) == 1 and sites.refusals == ()


def test_frozen_parameters_and_training_mode():
    module = Residual().train().requires_grad_(False)
    sites = sites_of(module, torch.zeros(2, 1, 8, 8))
    assert len(sites.layers) == 5 and len(sites.chains) == 2
    assert all(m.training for m in module.modules())
    assert not any(p.requires_grad for p in module.parameters())


def test_buffers_scalars_empties_and_unknown_parameters():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.empty = nn.Parameter(torch.zeros(0, 4))
            self.table = nn.Parameter(torch.zeros(2, 2))
            self.register_buffer("mask", torch.ones(3, 3))
            self.register_buffer("passing", torch.ones(3, 3), persistent=False)
            self.fc, self.bilinear = nn.Linear(3, 3), nn.Bilinear(3, 3, 2)

        def forward(self, x):
            return self.bilinear(self.fc(x) * self.scale, x @ self.mask * self.passing[0])

    sites = sites_of(Odd(), torch.zeros(2, 3))
    assert names(sites) == ["fc"]
    assert sites.rest == ("scale", "empty", "table", "mask", "bilinear.weight", "bilinear.bias")
    assert [r.where for r in sites.refusals] == ["table", "bilinear.weight"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_an_empty_layer_is_rest():
    net = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2))
    sites = sites_of(net, torch.zeros(2, 3))
    assert sites.layers == () and len(sites.rest) == 4 and sites.refusals == ()


def test_hooks_keep_the_form_free_unless_they_touch_the_weight():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].register_forward_hook(lambda module, args, output: output * 2)
    net[1].register_forward_pre_hook(lambda module, args: (args[0] + module.weight.mean(),))
    sites = sites_of(net, torch.zeros(2, 3))
    assert sites["0"].rigid == "" and "read raw" in sites["1"].rigid


def test_raw_reads_make_a_layer_rigid_even_where_only_export_runs(monkeypatch):
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return F.linear(self.a(x), self.b.weight, self.b.bias)

    sites = sites_of(Raw(), torch.zeros(2, 3))
    assert sites["a"].rigid == "" and "read raw" in sites["b"].rigid
    assert sites["b"].positions == 1 and sites.refusals == ()
    monkeypatch.setattr("lamina.network.discover.observe", lambda network, sites: "broken")
    sites = sites_of(Raw(), torch.zeros(2, 3))
    assert sites["a"].rigid == "" and "read raw" in sites["b"].rigid


def test_compiled_and_scripted_parts():
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(3, 3), torch.compile(nn.Linear(3, 3), backend="eager")

        def forward(self, x):
            return self.c(self.a(x))

    sites = sites_of(Parts(), torch.zeros(2, 5, 3))
    assert [(s.name, s.positions) for s in sites.layers] == [("a", 5), ("c._orig_mod", 5)]
    assert sites["a"].rigid == "" and "torch.compile" in sites["c._orig_mod"].rigid


def test_extra_state_is_named():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    sites = discover(Network(nn.Sequential(Extra(2, 2)), (torch.zeros(1, 2),)))
    assert "not stored" in why(sites, "0._extra_state")


def test_discovery_is_deterministic_and_survives_a_copy():
    module = Gpt()
    inputs = (torch.zeros(2, 4, dtype=torch.long),)
    first = discover(Network(module, inputs))
    assert first == discover(Network(module, inputs))
    assert first == discover(Network(copy.deepcopy(module), inputs))
    assert isinstance(first.layers[0], Site)


def test_the_input_size_of_a_convolution_is_known_where_every_call_had_the_same():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3)
            self.never, self.fc = nn.Conv2d(3, 3, 3), nn.Linear(5, 2)

        def forward(self, x):
            return self.fc(self.other(self.other(self.same(self.same(x)))))

    sites = sites_of(Head(), torch.zeros(2, 3, 8, 9))
    assert sites["same"].extent == (8, 9) and sites["same"].positions == 144
    assert sites["other"].extent == sites["never"].extent == sites["fc"].extent == ()
    assert discover(Network(Head())).layers[0].extent == ()
