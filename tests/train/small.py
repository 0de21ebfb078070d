"""A small trained network, its data, and edits of every form of values."""

from __future__ import annotations

import torch
from torch import nn

from lamina.data import Data
from lamina.forms import Codebook, Edit, Grid, Plain, Sparse, Values, install
from lamina.network.source import Network
from lamina.plan.apply import Edited, copy_module


def make_batches(count: int = 12, size: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three linearly separable classes in eight dimensions."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(count * size, 8, generator=g)
    y = (x @ torch.randn(8, 3, generator=g)).argmax(1)
    return list(zip(x.split(size), y.split(size), strict=True))


def make_data(count: int = 12, size: int = 32) -> Data:
    return Data(train=make_batches(count, size))


def make_mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3)
    )


def make_network(module: nn.Module | None = None) -> Network:
    """The network after a short ordinary training, in evaluation mode."""
    module = make_mlp() if module is None else module
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    module.train()
    for _ in range(6):
        for x, y in make_batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
    return Network(module.eval(), (torch.zeros(2, 8),))


def to_grid(tensor: torch.Tensor, step: float) -> Grid:
    step = float(torch.tensor(step))
    symbols = (tensor.detach().float() / step).round().to(torch.int32)
    return Grid(symbols, step, None, 1, tensor.dtype)


def to_codebook(tensor: torch.Tensor, count: int = 4) -> Codebook:
    """`count` equal bins and a zero, which is the first centroid."""
    flat = tensor.detach().float()
    low, high = float(flat.min()), float(flat.max())
    index = ((flat - low) / (high - low) * count).long().clamp_max(count - 1) + 1
    centroids = torch.stack([flat[index == i + 1].mean() for i in range(count)])
    index[flat.abs() < 0.05] = 0
    centroids = torch.cat([torch.zeros(1), centroids.nan_to_num()])
    return Codebook(index.to(torch.int32), centroids, tensor.dtype)


def to_sparse(tensor: torch.Tensor, least: float = 0.1) -> Sparse:
    return Sparse(torch.where(tensor.detach().abs() < least, 0.0, tensor.detach()))


def edit_all(network: Network, values: dict[str, Values]) -> Edited:
    module = copy_module(network.module)
    parameters = dict(network.module.named_parameters())
    floats = {name: parameters[name].detach().clone() for name in values if name in parameters}
    edits = tuple(Edit(name, "values", values=v) for name, v in values.items())
    install(module, edits)
    return Edited(Network(module, network.example_inputs), edits, floats)


def edit_grids(network: Network, step: float = 0.15) -> Edited:
    """Every weight and bias on a grid."""
    named = network.module.named_parameters()
    return edit_all(network, {name: to_grid(p, step) for name, p in named})


def plain(tensor: torch.Tensor) -> Plain:
    return Plain(tensor.detach().clone())
