"""Retraining: what is held stays held, what is frozen stays frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.train.small import make_batches, make_data, make_network, to_codebook
from torch import nn

from lamina.data import Data, TensorLoader
from lamina.errors import BudgetError, DataError
from lamina.forms import Codebook, Edit, find_tensor
from lamina.network.discover import discover
from lamina.recipes.pruning import covered
from lamina.recipes.retraining import (
    LaterEpochs,
    Session,
    check_data,
    dropout_scaled,
    scaled_dropout,
)
from lamina.recipes.settings import Pruning
from lamina.recipes.sharing import share
from lamina.train import Recovery
from lamina.train.hold import HeldCodebook


def session(data: Data | None = None, seed: int = 0, **pruning: Any) -> tuple[Session, list[Any]]:
    network = make_network()
    layers = covered(network, discover(network).layers, "test")
    wanted = Pruning(**{"rounds": 1, "last": 1, **pruning})
    return Session(network, data or make_data(), seed, wanted, lambda *_: None), layers


def test_the_gradient_of_a_shared_value_is_the_sum_over_its_members() -> None:
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    weight[::2] = 0
    form = share(weight, 5)
    dense = form.dense().requires_grad_()
    factor = torch.randn(9, 7, generator=torch.Generator().manual_seed(1))
    (dense.sin() * factor).sum().backward()
    held = HeldCodebook(form)
    (held()[0].sin() * factor).sum().backward()
    assert dense.grad is not None and held.centroids.grad is not None
    expected = torch.stack([dense.grad[form.index == i].sum() for i in range(len(form.centroids))])
    expected[0] = 0  # the zero does not move
    assert torch.allclose(held.centroids.grad, expected, atol=1e-6)
    mean = expected / form.index.flatten().bincount().clamp_min(1)
    assert not torch.allclose(held.centroids.grad, mean, atol=1e-3)


def test_pruned_places_stay_zero_through_rounds() -> None:
    work, layers = session(rounds=3, epochs=1, last=2, lr=1e-2)
    shares = {layers[0].name: 0.1, layers[1].name: 0.5}
    work.prune(layers, shares)
    for site in layers:
        weight = find_tensor(work.module, site.weight)
        assert int((weight != 0).sum()) == round(shares[site.name] * weight.numel())
    was = find_tensor(work.module, layers[0].weight).clone()
    work.train(1, 1e-2, layers)
    now = find_tensor(work.module, layers[0].weight)
    assert torch.equal(now == 0, was == 0) and not torch.equal(now, was)
    assert work.phases == 4 and [int(r["phase"]) for r in work.history][-1] == 4
    steps = [row["step"] for row in work.history]
    assert steps == sorted(steps)


def test_shared_values_train_and_their_places_do_not() -> None:
    work, layers = session()
    name = layers[0].weight
    weight = find_tensor(work.module, name)
    work.hold([Edit(name, "values", values=share(weight * (weight.abs() > 0.1), 7))])
    was = work.values(name)
    work.train(2, 1e-2, layers)
    now = work.values(name)
    assert isinstance(now, Codebook) and torch.equal(now.index, was.index)
    assert now.centroids[0] == 0 and not torch.equal(now.centroids, was.centroids)
    dense = find_tensor(work.module, name)
    assert torch.equal(dense == 0, was.index == 0)
    assert len(dense[dense != 0].unique()) <= 7


def test_frozen_tensors_do_not_move_and_flags_come_back() -> None:
    work, layers = session()
    first, last = layers
    work.hold(
        [Edit(first.weight, "values", values=to_codebook(find_tensor(work.module, first.weight)))]
    )
    frozen = (first.weight, first.bias)
    was = {n: find_tensor(work.module, n).detach().clone() for n in (*frozen, last.weight)}
    held = work.values(first.weight)
    work.train(2, 1e-2, layers, frozen=frozen)
    assert all(torch.equal(find_tensor(work.module, n), was[n]) for n in frozen)
    assert torch.equal(work.values(first.weight).dense(), held.dense())
    assert not torch.equal(find_tensor(work.module, last.weight), was[last.weight])
    assert all(p.requires_grad for p in work.module.parameters())


def test_a_fork_leaves_its_origin_alone() -> None:
    work, layers = session()
    was = find_tensor(work.module, layers[0].weight).clone()
    fork = work.fork()
    fork.prune(layers, {s.name: 0.1 for s in layers})
    assert torch.equal(find_tensor(work.module, layers[0].weight), was)
    assert not work.history and fork.history and work.phases == 0


def test_the_original_is_not_touched() -> None:
    work, layers = session()
    was = {k: v.clone() for k, v in work.original.module.state_dict().items()}
    work.prune(layers, {s.name: 0.1 for s in layers})
    assert all(torch.equal(v, was[k]) for k, v in work.original.module.state_dict().items())


def test_dropout_follows_what_is_left_and_comes_back() -> None:
    assert scaled_dropout(0.5, 70, 70) == 0.5
    assert scaled_dropout(0.5, 0, 70) == 0.0
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4), nn.Linear(4, 2), nn.Dropout(0.2))
    with pytest.raises(KeyError), dropout_scaled(net, {"0": 0.01, "2": 0.25}):
        assert (net[1].p, net[3].p) == (0.2, 0.1)  # the one it feeds; the last: what is before it
        raise KeyError
    assert (net[1].p, net[3].p) == (0.4, 0.2)
    with dropout_scaled(net, {}):
        assert net[1].p == 0.4
    work, layers = session()
    work.prune(layers, {s.name: 0.1 for s in layers})
    assert [m.p for m in work.module.modules() if isinstance(m, nn.Dropout)] == [0.1]


def test_phases_and_seeds_see_different_epochs() -> None:
    batches = make_batches()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loader = TensorLoader(x, y, 32, shuffle=True)
    later = LaterEpochs(loader, 5)
    later.set_epoch(2)
    loader_batch = next(iter(later))[0]
    loader.set_epoch(7)
    assert torch.equal(next(iter(loader))[0], loader_batch)
    assert len(later) == len(loader) and later.dataset_size == len(x)
    found = []
    for seed in (0, 0, 1):
        work, layers = session(Data(train=TensorLoader(x, y, 32, shuffle=True)), seed)
        work.train(1, 1e-2, layers)
        found.append(find_tensor(work.module, layers[0].weight))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_recipe_needs_training_data() -> None:
    for data in (None, Data(calibration=make_batches())):
        with pytest.raises(DataError, match="train"):
            check_data(data, "test")


def test_decay_is_for_matrices_and_never_for_shared_or_frozen_values() -> None:
    """With labels that teach nothing new, what shrinks shrinks by decay alone."""
    sums = {}
    for decay in (0.0, 3.0):
        work, layers = session(decay=decay)
        first, last = layers
        weight = find_tensor(work.module, first.weight)
        work.hold([Edit(first.weight, "values", values=to_codebook(weight))])
        work.train(1, 1e-2, layers, frozen=(last.bias,))
        sums[decay] = {
            name: float(find_tensor(work.module, name).detach().abs().sum())
            for name in (first.weight, last.weight, last.bias)
        }
    assert sums[3.0][last.weight] < 0.95 * sums[0.0][last.weight]
    assert sums[3.0][last.bias] == sums[0.0][last.bias]
    assert sums[3.0][first.weight] > 0.95 * sums[0.0][first.weight]
    with pytest.raises(BudgetError, match="decay"):
        Recovery(decay=-1.0)


def test_where_all_is_frozen_there_is_nothing_to_train() -> None:
    work, layers = session()
    names = [name for name, _ in work.module.named_parameters()]
    work.train(1, 1e-2, layers, frozen=names)
    assert not work.history and all(p.requires_grad for p in work.module.parameters())
