from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import (
    edit_all,
    edit_grids,
    make_batches,
    make_data,
    make_network,
    plain,
    to_codebook,
    to_grid,
    to_sparse,
)
from torch import nn

from lamina.artifact import pack
from lamina.data import Data
from lamina.errors import BudgetError, DataError, NetworkError
from lamina.forms import Codebook, Edit, Grid, Sparse, install
from lamina.network.source import Network
from lamina.plan.apply import Edited, copy_module
from lamina.train import Recovered, Recovery, recover

THREE = Recovery(epochs=3, lr=5e-3)


def state_of(edited: Edited) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in edited.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def distance(network: Network, edited: Edited) -> float:
    """Mean squared difference of the outputs."""
    x = torch.cat([x for x, _ in make_batches()])
    ours = Network(edited.model).forward(x)
    return float((ours - network.forward(x)).square().mean())


def file_of(recovered: Recovered, chains: dict[str, str] | None = None) -> bytes:
    edited = recovered.edited
    return pack(edited.model, edited.edits, edited.network.source, chains or {})


def test_training_brings_the_network_back_and_touches_nothing_else() -> None:
    network = make_network()
    edited = edit_grids(network, 0.3)
    data = make_data()
    before, original = state_of(edited), network.digest()
    flags = [m.training for m in edited.model.modules()]
    random = torch.get_rng_state()
    result = recover(network, edited, data, Recovery(epochs=15, lr=5e-3))
    assert torch.equal(torch.get_rng_state(), random)
    assert network.digest() == original
    assert same(state_of(edited), before)
    assert distance(network, result.edited) < 0.5 * distance(network, edited)
    losses = [row["loss"] for row in result.history]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert result.steps == 15 * 12
    model = result.edited.model
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert result.state == {}  # nothing asked for it
    assert not torch.equal(model[1].running_mean, edited.model[1].running_mean)


def test_the_model_is_what_its_edits_say() -> None:
    network = make_network()
    result = recover(network, edit_grids(network), make_data(), THREE)
    fresh = make_network().module
    install(fresh, result.edited.edits)
    buffers = dict(result.edited.model.named_buffers())
    for name, tensor in fresh.state_dict().items():
        if name not in buffers:
            assert torch.equal(tensor, result.edited.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("share", "rate", "start"),
    [
        (0.75, True, "planned"),
        (0.75, True, "wide"),
        (1.0, False, "planned"),
        (1.2, True, "planned"),
    ],
)
def test_the_file_keeps_to_its_limit(share: float, rate: bool, start: str) -> None:
    network = make_network()
    edited = edit_grids(network, 0.02 if rate else 0.1)
    chains = {"0": "rdoq", "4": "rdoq"}
    size = len(pack(edited.model, edited.edits, "module", chains))
    limit = int(share * size)
    recovery = Recovery(epochs=12, lr=5e-3, rate=rate, start=start)
    result = recover(network, edited, make_data(), recovery, limit=limit, chains=chains)
    assert len(file_of(result, chains)) <= limit
    assert all("price" in row for row in result.history) is rate


def test_masks_codebooks_and_grids_survive() -> None:
    network = make_network()
    p = dict(network.module.named_parameters())
    values = {
        "0.weight": to_sparse(p["0.weight"]),
        "4.weight": to_codebook(p["4.weight"]),
        "4.bias": to_grid(p["4.bias"], 0.05),
        "0.bias": plain(p["0.bias"]),
    }
    edited = edit_all(network, values)
    result = recover(network, edited, make_data(), THREE)
    after = {e.path: e.values for e in result.edited.edits}
    assert set(after) == set(p)
    assert all(type(after[name]) is type(v) for name, v in values.items())
    for name in p:
        now = result.edited.model.state_dict()[name]
        assert torch.equal(now, after[name].dense())
        assert not torch.equal(now, edited.model.state_dict()[name]), name
    assert isinstance(values["0.weight"], Sparse)
    zeros = values["0.weight"].tensor == 0
    assert zeros.any() and not result.edited.model[0].weight[zeros].any()
    book = after["4.weight"]
    assert isinstance(book, Codebook) and isinstance(values["4.weight"], Codebook)
    assert torch.equal(book.index, values["4.weight"].index)
    assert len(result.edited.model[4].weight.unique()) <= len(book.centroids)
    assert isinstance(after["4.bias"], Grid)


class Interrupted(Exception):
    pass


def interrupt(done: int, total: int, text: str) -> None:
    if done >= 20:
        raise Interrupted


class Noisy:
    """A loader with its own randomness that says it has more batches than it gives."""

    dataset_size = 384

    def __len__(self) -> int:
        return 13

    def __iter__(self) -> Any:
        for i in torch.randperm(12).tolist():
            x, y = make_batches()[i]
            yield x + 0.1 * torch.randn_like(x), y


@pytest.mark.parametrize("kind", ["list", "noisy", "shuffled", "generator"])
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path, kind: str) -> None:
    def data() -> Data:
        if kind == "list":
            return make_data()
        if kind == "noisy":
            return Data(train=Noisy())
        x, y = (torch.cat(t) for t in zip(*make_batches(), strict=True))
        own = torch.Generator().manual_seed(8) if kind == "generator" else None
        set_ = torch.utils.data.TensorDataset(x, y)
        return Data(
            train=torch.utils.data.DataLoader(set_, batch_size=32, shuffle=True, generator=own)
        )

    network = make_network()
    edited = edit_grids(network, 0.02)
    limit = 0.7 * len(pack(edited.model, edited.edits, "module", {}))
    recovery = Recovery(epochs=2.5, lr=5e-3)
    whole = recover(network, edited, data(), recovery, limit=limit)
    path = tmp_path / "state.pt"
    with pytest.raises(Interrupted):
        recover(network, edited, data(), recovery, limit=limit, checkpoint=path, progress=interrupt)
    assert path.exists()
    seen: list[int] = []
    again = recover(
        network, edited, data(), recovery, limit=limit, checkpoint=path,
        progress=lambda done, *_: seen.append(done),
    )  # fmt: skip
    assert seen[0] > 20 and seen[-1] == whole.steps  # it went on, and did not begin again
    assert file_of(again) == file_of(whole)
    assert same(state_of(again.edited), state_of(whole.edited))
    assert again.history == whole.history
    assert again.state["step"] == whole.steps
    # A checkpoint of another training is not continued.
    other = Recovery(epochs=2.5, lr=4e-3)
    seen.clear()
    fresh = recover(network, edited, data(), other, limit=limit)
    mixed = recover(
        network, edited, data(), other, limit=limit, checkpoint=path,
        progress=lambda done, *_: seen.append(done),
    )  # fmt: skip
    assert seen[0] == 10
    assert file_of(mixed) == file_of(fresh)


def test_the_seed_is_the_only_randomness() -> None:
    network = make_network()
    edited = edit_grids(network)
    first = recover(network, edited, make_data(), THREE)
    torch.manual_seed(99)
    second = recover(network, edited, make_data(), THREE)
    assert file_of(first) == file_of(second)
    third = recover(network, edited, make_data(), Recovery(epochs=3, lr=5e-3, seed=-(10**30)))
    assert file_of(third) != file_of(first)


def test_a_low_rank_pair_trains_on_grids() -> None:
    network = make_network()
    module = copy_module(network.module)
    pair = Edit("0", "low_rank", {"folds": 1, "rank": 4})
    install(module, [pair])
    u, s, v = torch.linalg.svd(network.module[0].weight.detach())
    values = {"0.0.weight": to_grid(s[:4, None] * v[:4], 0.1), "0.1.weight": to_grid(u[:, :4], 0.1)}
    edits = (pair, *(Edit(n, "values", values=x) for n, x in values.items()))
    install(module, edits[1:])
    edited = Edited(Network(module, network.example_inputs), edits)
    result = recover(network, edited, make_data(), Recovery(epochs=8, lr=5e-3, hidden=0.1))
    assert distance(network, result.edited) < 0.7 * distance(network, edited)
    assert result.edited.edits[0] == pair
    assert file_of(result)
    assert not any(m._forward_hooks for m in result.edited.model.modules())
    assert not any(m._forward_hooks for m in network.module.modules())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(8, 6)
        self.decode = nn.Linear(8, 6, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.encode(x)) * torch.sigmoid(self.decode(x)))


@pytest.mark.parametrize("names", [["encode"], ["decode"], ["encode", "decode"]])
def test_tied_weights_stay_tied(names: list[str]) -> None:
    network = make_network(Tied())
    weight = network.module.encode.weight
    edited = edit_all(network, {f"{n}.weight": to_grid(weight, 0.2) for n in names})
    result = recover(network, edited, make_data(), THREE)
    model = result.edited.model
    assert model.encode.weight is model.decode.weight
    assert not torch.equal(model.encode.weight, edited.model.encode.weight)
    held = [e.values for e in result.edited.edits if e.path == f"{names[-1]}.weight"]
    assert len(held) == 1 and torch.equal(held[0].dense(), model.encode.weight)
    assert len([e for e in result.edited.edits if e.path.startswith(("enc", "dec"))]) == 2


def test_half_precision_trains() -> None:
    network = make_network()
    network.module.bfloat16()
    edited = edit_grids(network, 0.3)
    result = recover(network, edited, make_data(), Recovery(epochs=8, lr=5e-3))
    assert {p.dtype for p in result.edited.model.parameters()} == {torch.bfloat16}
    batches = [(x.bfloat16(), y) for x, y in make_batches()]

    def off(model: nn.Module) -> float:
        return sum(
            float((Network(model).forward(x) - network.forward(x)).float().square().mean())
            for x, _ in batches
        )

    assert off(result.edited.model) < off(edited.model)


def test_frozen_parameters_stay() -> None:
    network = make_network()
    edited = edit_grids(network)
    edited.model[0].weight.requires_grad_(False)
    start = state_of(edited)
    result = recover(network, edited, make_data(), Recovery(epochs=2, start="wide"), limit=10**6)
    assert torch.equal(result.edited.model[0].weight, start["0.weight"])
    assert not result.edited.model[0].weight.requires_grad
    assert not torch.equal(result.edited.model[4].weight, start["4.weight"])
    edited.model.requires_grad_(False)
    with pytest.raises(NetworkError, match="nothing to train"):
        recover(network, edited, make_data(), THREE)


def test_a_last_batch_of_one_sample_is_no_end() -> None:
    network = make_network()
    batches = [*make_batches()[:3], tuple(t[:1] for t in make_batches()[3])]
    result = recover(network, edit_grids(network), Data(train=batches), Recovery(epochs=2))
    assert result.steps == 8


def test_dicts_labels_of_none_and_no_grad_are_fine() -> None:
    network = make_network()
    edited = edit_grids(network)
    data = Data(train=[{"input": x} for x, _ in make_batches()])
    with torch.no_grad():
        result = recover(network, edited, data, replace(THREE, epochs=12, lr=2e-3))
    assert distance(network, result.edited) < distance(network, edited)


def test_what_cannot_be_trained_says_so() -> None:
    network = make_network()
    edited = edit_grids(network)
    with pytest.raises(DataError, match=r"data\.train"):
        recover(network, edited, Data(calibration=make_batches()))
    with pytest.raises(DataError, match="no batches"):
        recover(network, edited, Data(train=[]))
    wrong = Data(train=[(torch.randn(4, 9), torch.zeros(4, dtype=torch.int64))])
    with pytest.raises(DataError, match="does not take this batch"):
        recover(network, edited, wrong, THREE)
    far = Data(train=[(torch.full((4, 8), float("inf")), torch.zeros(4, dtype=torch.int64))])
    with pytest.raises(DataError, match="not finite"):
        recover(network, edited, far, THREE)
    with torch.device("meta"):
        hollow = nn.Linear(8, 3)
    with pytest.raises(NetworkError, match="no values at weight"):
        recover(Network(hollow), Edited(Network(hollow), ()), make_data(), THREE)


@pytest.mark.parametrize(
    "bad",
    [{"epochs": 0}, {"epochs": float("nan")}, {"lr": -1}, {"distill": 1.5}, {"start": "wied"},
     {"temperature": 0}, {"hidden": -1}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match=next(iter(bad))):
        Recovery(**bad)


def test_the_users_own_accelerator_is_left_alone() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    network = make_network()
    edited = edit_grids(network)
    one = Recovery(epochs=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recover(network, edited, make_data(), one)
            assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
            recover(network, edited, make_data(), one)
    finally:
        AcceleratorState._reset_state()


def test_training_does_not_warn() -> None:
    network = make_network()
    for epochs in (0.05, 0.1, 1.0):  # one step, one step, a pass
        result = recover(network, edit_grids(network), make_data(), Recovery(epochs=epochs))
        assert result.steps == max(1, round(12 * epochs))
