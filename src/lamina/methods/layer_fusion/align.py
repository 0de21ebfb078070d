"""Alignment: the hidden neurons of one layer put in the order of another's, at no change.

The order of neurons between two layers is arbitrary: rows of the first (and the entries of a
BatchNorm behind it) and columns of the second may be permuted together, and the network computes
what it did. Two layers that were trained apart are alike at most up to such an order, and their
mean is worth something only in one.

**Reference.** Ainsworth, Hayase, Srinivasa 2023, arXiv:2209.04836, section 3.2 (matching weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamina.errors import MethodError
from lamina.forms import Edit, Plain, find_tensor, install
from lamina.network.sites import Site
from lamina.network.tensors import join, named_tensors


@dataclass(frozen=True)
class Hidden:
    """The neurons between two layers, which nobody else reads.

    Args:
        producer: the layer whose rows they are.
        consumer: the layer whose inputs they are.
        norms: module paths of the BatchNorms between them.
        repeat: inputs of the consumer that one neuron becomes (pixels, where a map is flattened).
    """

    producer: Site
    consumer: Site
    norms: tuple[str, ...] = ()
    repeat: int = 1


def match(kept: Sequence[Tensor], moved: Sequence[Tensor]) -> Tensor:
    """Return the order of the second layer's neurons that is nearest to the first one's.

    Args:
        kept, moved: descriptions of the neurons `[n, ...]`, any number of them, such as the rows of
            the layer before and the columns of the layer after; each counts by its cosine.

    Returns:
        `[n]`: neuron i of the first goes with neuron `order[i]` of the second; the sum of cosines
        is the largest there is (linear assignment). Equal neurons keep their places.

    Raises:
        MethodError: the descriptions do not fit together.

    Example:
        >>> rows = torch.eye(3)
        >>> match([rows], [rows[[2, 0, 1]]])
        tensor([1, 2, 0])
    """
    from scipy.optimize import linear_sum_assignment

    shapes = [[tuple(t.shape) for t in side] for side in (kept, moved)]
    if not kept or shapes[0] != shapes[1]:
        raise MethodError("these neurons cannot be matched", f"{shapes[0]} and {shapes[1]}")
    n = len(kept[0])
    gain = torch.zeros(n, n, dtype=torch.float64)
    for one, two in zip(kept, moved, strict=True):
        a, b = (t.detach().to("cpu", torch.float64).flatten(1) for t in (one, two))
        gain += (a / _norms(a)) @ (b / _norms(b)).mT
    order = torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
    stay = torch.arange(n)
    better = gain[stay, order].sum() > gain.diagonal().sum() + 1e-9 * n
    return order if bool(better) else stay


def permute(module: nn.Module, hidden: Sequence[Hidden], order: Tensor) -> list[Edit]:
    """Return edits that put hidden neurons in another order; the network computes the same.

    Args:
        module: the network, which is not changed.
        hidden: the neurons; several where layers are tied, so that all uses move alike.
        order: `[n]`: neuron i is to be what neuron `order[i]` was.

    Raises:
        MethodError: it is no order of these neurons; a layer is of a kind that has no such rows; or
            a weight is tied to one that would not move with it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> sites = [Site(n, weight=f"{n}.weight", bias=f"{n}.bias") for n in "02"]
        >>> edits = permute(net, [Hidden(*sites)], torch.tensor([2, 0, 1]))
        >>> [edit.path for edit in edits]
        ['0.weight', '2.weight', '0.bias']
    """
    tensors = named_tensors(module)
    n = len(order)
    if sorted(order.tolist()) != list(range(n)):
        raise MethodError("this is no order of neurons", str(order.tolist())[:80])
    rows, columns, alone = set(), set(), set()
    repeat = hidden[0].repeat
    for each in hidden:
        before, after = each.producer, each.consumer
        for site in (before, after):
            if site.op not in ("linear", "conv") or site.transposed or site.groups != 1:
                why = f"it is {site.op} in {site.groups} groups"
                raise MethodError("no neurons of this layer can be moved", site.name, why)
        sizes = tensors.by_name[before.weight].shape[0], tensors.by_name[after.weight].shape[1]
        if sizes != (n, n * repeat) or each.repeat != repeat:
            raise MethodError("this is no order of the neurons", f"{before.name} -> {after.name}")
        rows.add(before.weight)
        columns.add(after.weight)
        alone |= {before.bias} if before.bias else set()
        for path in each.norms:
            norm = module.get_submodule(path)
            for leaf, tensor in (*norm._parameters.items(), *norm._buffers.items()):
                if tensor is not None and tensor.dim():
                    alone.add(join(path, leaf))
    inputs = (order[:, None] * repeat + torch.arange(repeat)).flatten()
    moved: dict[str, Tensor] = {}
    for names, axis, index in ((rows, 0, order), (columns, 1, inputs), (alone, 0, order)):
        for first in sorted({tensors.first[name] for name in names}):
            if left := set(tensors.names[first]) - names:
                why = f"it is tied to {', '.join(sorted(left))}, which would not move"
                raise MethodError("neurons cannot be moved", first, why)
            now = moved.get(first, tensors.by_name[first].detach())
            moved[first] = now.index_select(axis, index.to(now.device))
    return [Edit(name, "values", values=Plain(tensor)) for name, tensor in moved.items()]


def align(
    module: nn.Module, hidden: Mapping[str, Hidden], groups: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    """Put the neurons of the layers of each group in one order, in place.

    A layer whose neurons cannot be moved sets the order, or else the first does. Where the layers
    after them are about to be shared too, their columns count as much as the rows. What is tied
    already moves together, or not at all.

    Args:
        module: the network; it computes the same afterwards.
        hidden: the hidden neurons, by the name of the layer before them.
        groups: names of the layers that will share a weight; those that are gone do not count.

    Returns:
        names of the layers whose neurons have moved.
    """
    place = {name: i for i, group in enumerate(groups) for name in group}
    done: list[str] = []
    for group in groups:
        tensors = named_tensors(module)
        parts: dict[str, list[str]] = {}
        for name in (name for name in group if join(name, "weight") in tensors.first):
            parts.setdefault(tensors.first[join(name, "weight")], []).append(name)
        fixed = [names for names in parts.values() if not all(name in hidden for name in names)]
        model = (fixed or list(parts.values()))[0]
        there = [name for names in parts.values() for name in names if name in hidden]
        after = {place.get(hidden[name].consumer.name) for name in there}
        together = not fixed and len(after) == 1 and None not in after
        for names in parts.values():
            if names is model or names in fixed:
                continue
            # Afresh each time: moving one layer may turn the columns of another.
            kept = [find_tensor(module, join(model[0], "weight"))]
            moved = [find_tensor(module, join(names[0], "weight"))]
            if together:
                kept.append(columns_of(module, hidden[model[0]]))
                moved.append(columns_of(module, hidden[names[0]]))
            order = match(kept, moved)
            if torch.equal(order, torch.arange(len(order))):
                continue
            try:
                edits = permute(module, [hidden[name] for name in names], order)
            except MethodError:  # a tie holds them: they are shared in the order they have
                continue
            install(module, edits)
            done += names
    return tuple(done)


def columns_of(module: nn.Module, hidden: Hidden) -> Tensor:
    """Return the columns that the layer after hidden neurons has for each of them `[n, ...]`."""
    weight = find_tensor(module, hidden.consumer.weight).detach().transpose(0, 1)
    return weight.reshape(weight.shape[0] // hidden.repeat, -1)


def _norms(rows: Tensor) -> Tensor:
    return rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
