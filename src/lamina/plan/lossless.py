"""Lossless: the plan that keeps every value, and the file that holds each tensor bit for bit."""

from __future__ import annotations

from dataclasses import replace

import torch

from lamina import artifact
from lamina.artifact import records
from lamina.artifact.exact import exact
from lamina.errors import FileError
from lamina.forms import Edit, Plain, Sparse
from lamina.measure.stats import Cost
from lamina.methods.base import Candidate, Step, weights_of
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.network.tensors import named_tensors
from lamina.plan.apply import Edited, copy_module
from lamina.plan.budget import Budget
from lamina.plan.costs import original_cost
from lamina.plan.decide import make_plan
from lamina.plan.plan import Plan

FEWEST_ZEROS = 0.05  # below this share of zeros their pattern is not worth looking at


def keep_all(
    network: Network, sites: Sites, budget: Budget | None = None
) -> tuple[Plan, Edited, bytes]:
    """Return the plan that keeps every site, a copy of the network, and its file.

    Nothing is predicted: the file is written first, and the plan says what it takes.

    Args:
        network: what to store.
        sites: from `discover`.
        budget: what the plan will say was asked; nothing is decided on it.

    Raises:
        FileError: a tensor cannot be stored, or did not come back as it was.

    Example:
        >>> from torch import nn
        >>> net = Network(nn.Linear(100, 50))
        >>> plan, edited, file = keep_all(net, Sites(()))
        >>> len(file) < 0.95 * 4 * (5000 + 50), plan.error
        (True, 0)
    """
    copied = replace(network, module=copy_module(network.module))
    edits = zeros_apart(copied)
    chains = {site.name: "keep" for site in sites.layers}
    file = artifact.pack(
        copied.module, (*network.edits, *edits), network.source, chains, network.box
    )
    package = artifact.unpack(file)
    check_bits(network, package)
    kept, inside = {}, 0
    for site in sites.layers:
        names = [name for name in (site.weight, site.bias) if name in package.ledger]
        held = sum(package.ledger[name] for name in names)
        params = sum(tensor.numel() for tensor in weights_of(network, site).values())
        cost = Cost(params, 8.0 * held, site.macs)
        kept[site.name] = Candidate(site.name, (Step("keep", site.name),), cost, 0.0)
        inside += held
    original = original_cost(network, sites)
    others = original.params - sum(candidate.cost.params for candidate in kept.values())
    plan = make_plan(
        network, kept, budget or Budget(size="100%"), "sum",
        original, Cost(others, 8.0 * (len(file) - inside)),
        {name: (candidate,) for name, candidate in kept.items()},
    )  # fmt: skip
    return plan, Edited(copied, edits), file


def zeros_apart(network: Network) -> tuple[Edit, ...]:
    """Return edits that hold tensors of many zeros as a pattern and the rest, where it is shorter.

    By bits and not by value: a negative zero is none of the zeros, and comes back.
    """
    found = []
    tensors = named_tensors(network.module)
    for name, tensor in tensors.by_name.items():
        held = tensor.detach()
        if tensors.first[name] != name or held.numel() < 2:
            continue
        if float((held == 0).double().mean()) < FEWEST_ZEROS:
            continue
        if not isinstance(exact(held), Plain):
            continue  # zeros are as short among its integers
        if len(records.encode(Sparse(held))) < len(records.encode(Plain(held))):
            found.append(Edit(name, "values", values=Sparse(held)))
    return tuple(found)


def check_bits(network: Network, package: artifact.Package) -> None:
    """Compare every tensor of a file with the network's, bit by bit.

    Raises:
        FileError: one differs; a fault of Lamina's own, found before anything is written.
    """
    state = network.module.state_dict()
    for name, values in package.tensors.items():
        if not torch.equal(_bits(values.dense()), _bits(state[name])):
            raise FileError("a tensor did not come back bit for bit", name, "", "report this")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
