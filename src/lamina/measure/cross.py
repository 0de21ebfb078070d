"""What the inputs of two neighbours in a chain have in common: moments across an activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lamina.measure.columns import gradient_columns, input_columns
from lamina.measure.forward import at_rest, batches, call
from lamina.measure.stats import Cross
from lamina.network.chains import ELEMENTWISE, NORM
from lamina.network.sites import Site, Sites
from lamina.network.source import Network

WIDEST = 2304  # columns of the first layer: a float64 moment of more would pass 40 MiB
COLUMNS_PER_WIDTH, FEWEST = 32, 16_000  # looked at over the whole pass


@dataclass
class _Sums:
    moment: Tensor
    second: Tensor
    mean: Tensor
    x_second: Tensor
    x_mean: Tensor
    count: float = 0.0


def find_links(sites: Sites) -> tuple[tuple[Site, Site], ...]:
    """Return the neighbours of all chains whose positions agree: nothing pools or flattens between.

    Example:
        >>> fc1, fc2 = Site("a", module="a", shape=(4, 3)), Site("b", module="b", shape=(2, 4))
        >>> chain = Site("a..b", "chain", members=("a", "b"), between=(("relu",),))
        >>> [(a.name, b.name) for a, b in find_links(Sites((fc1, fc2), (chain,)))]
        [('a', 'b')]
    """
    layers = {site.name: site for site in sites.layers}
    found = []
    for chain in sites.chains:
        for (a, b), between in zip(pairwise(chain.members), chain.between, strict=True):
            ops = (layers[a].op, layers[b].op)
            alike = ops in (("linear", "linear"), ("conv", "conv"))
            groups, _, columns = layers[a].matrix_shape
            if alike and set(between) <= ELEMENTWISE | NORM and groups * columns <= WIDEST:
                found.append((layers[a], layers[b]))
    return tuple(found)


def measure_cross(
    network: Network, sites: Sites, loader: Iterable[Any], samples: int, seed: int = 0
) -> dict[str, Cross]:
    """Measure how the inputs of neighbours go together, over one pass without gradients.

    Args:
        network: what to measure; unchanged.
        sites: its sites; the chains say who are neighbours.
        loader: calibration batches.
        samples: how many to look at.
        seed: of the positions that are left out.

    Returns:
        by `"a->b"`, sums over positions, per sample.

    Raises:
        DataError: the network does not take the data.

    Example:
        >>> from lamina.network.discover import discover
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> network = Network(net, (torch.zeros(1, 3),))
        >>> cross = measure_cross(network, discover(network), [torch.randn(8, 3)], 8)
        >>> cross["0->2"].moment.shape
        torch.Size([4, 3])
    """
    links = find_links(sites)
    if not links:
        return {}
    sums = {f"{a.name}->{b.name}": _empty(a, b) for a, b in links}
    held: dict[str, Tensor] = {}
    module, seen, drawn = network.module, 0, seed
    by_first: dict[str, list[tuple[Site, Site]]] = {}
    by_second: dict[str, list[tuple[Site, Site]]] = {}
    for a, b in links:
        by_first.setdefault(a.module, []).append((a, b))
        by_second.setdefault(b.module, []).append((a, b))

    def hook(path: str) -> Callable[..., None]:
        def see(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            for a, b in by_second.get(path, ()):
                if a.name in held and given:
                    _add(sums[f"{a.name}->{b.name}"], a, b, held.pop(a.name), given[0], limits)
            for a, _ in by_first.get(path, ()):
                if given:
                    held[a.name] = given[0]

        return see

    limits = (1.0, seed)
    handles = [
        module.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True)
        for path in {*by_first, *by_second}
    ]
    try:
        with at_rest(module, seed=seed), torch.no_grad():
            for batch in batches(module, loader, samples):
                limits = (min(1.0, batch.size / samples), drawn)
                call(module, batch, network.example_inputs)
                held.clear()
                seen, drawn = seen + batch.size, drawn + 1
    finally:
        for handle in handles:
            handle.remove()
    return {name: _finish(found, seen) for name, found in sums.items() if found.count}


def _empty(a: Site, b: Site) -> _Sums:
    groups, _, columns = a.matrix_shape
    width = groups * columns
    channels = b.matrix_shape[2] * b.groups // max(1, torch.Size(b.kernel).numel())

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    return _Sums(
        zeros(channels, width), zeros(channels, channels), zeros(channels),
        zeros(width, width), zeros(width),
    )  # fmt: skip


def _add(sums: _Sums, a: Site, b: Site, x: Tensor, z: Tensor, limits: tuple[float, int]) -> None:
    """Add what one call of each layer saw at the same positions."""
    share, seed = limits
    width = len(sums.x_mean)
    limit = max(1, int(share * max(FEWEST, COLUMNS_PER_WIDTH * width)))
    # The same draw on both sides, so that positions agree.
    first = torch.Generator().manual_seed(seed)
    second = torch.Generator().manual_seed(seed)
    parts = list(input_columns(a, "direct", nn.Identity(), (x,), {}, None, limit, first))
    columns = torch.cat([p.values for p in parts], 1).transpose(0, 1).flatten(1).double().cpu()
    after = list(gradient_columns(_plain(b), "direct", z, len(sums.mean), limit, second))
    channels = torch.cat([p.values for p in after], 1).transpose(0, 1).flatten(1).double().cpu()
    if len(columns) != len(channels):
        return  # the positions do not agree after all
    weight = parts[0].weight
    sums.moment.addmm_(channels.T, columns, alpha=weight)
    sums.second.addmm_(channels.T, channels, alpha=weight)
    sums.x_second.addmm_(columns.T, columns, alpha=weight)
    sums.mean.add_(channels.sum(0), alpha=weight)
    sums.x_mean.add_(columns.sum(0), alpha=weight)
    sums.count += weight * len(columns)


def _plain(site: Site) -> Site:
    """Return a site whose columns at the output are all channels at one position."""
    return Site(site.name, op=site.op, shape=site.shape, kernel=site.kernel)


def _finish(sums: _Sums, samples: int) -> Cross:
    return Cross(
        sums.moment / samples, sums.second / samples, sums.mean / samples,
        sums.x_second / samples, sums.x_mean / samples, sums.count / samples,
    )  # fmt: skip
