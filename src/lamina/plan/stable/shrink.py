"""Removing what is stable: exact algebra on a chain of layers, in float64, without any proof.

With W, b a layer and V, c the one behind its ReLU:

* a unit that is never on goes, with its row of W and its columns of V;
* of two units with `w_d = a w_s, b_d = a b_s, a > 0` one goes, wherever they are: `V_s += a V_d`;
* of units that are always on (linear ones) with `W_d = K W_B` only B stay (pivoted QR):
  `V_B += V_d K`, `c += V_d (b_d - K b_B)`;
* where all that are left are always on, both layers are one: `V W x + (V b + c)`;
* where none is left the network is a constant.

Source: Serra, Kumar and Ramalingam 2020, arXiv:2001.00218.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lamina.measure.bounds import run
from lamina.plan.stable.read import Chain, Layer, columns

RANK = 1e-9  # of the largest pivot: below it a row depends on the others
LARGEST = 1e3  # |K|: larger ones would carry rounding errors into the next layer
INACTIVE, ACTIVE = -1, 1


@dataclass
class Shrunk:
    """A chain without what could be removed.

    Args:
        chain: what is left.
        states: layer path -> for each output INACTIVE, ACTIVE or something else; kept in step.
        gone: modules that became nothing.
        removed: what went, and how: `layer`, `unit`, `what`, and with it what it became part of.
        notes: what could have gone, and why it did not.
    """

    chain: Chain
    states: dict[str, Tensor]
    gone: list[str] = field(default_factory=list)
    removed: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, number: int, layer: Layer, after: Layer | None = None) -> None:
        """Exchange a layer, and the one behind it."""
        layers = list(self.chain.layers)
        layers[number] = layer
        if after is not None:
            layers[number + 1] = after
        self.chain = replace(self.chain, layers=tuple(layers))

    def drop(self, number: int, keep: Tensor) -> None:
        """Remove outputs of a layer, and the columns behind them."""
        layer, after = self.chain.layers[number], self.chain.layers[number + 1]
        wide = keep.repeat_interleave(columns(self.chain, number))
        units = tuple(u for u, kept in zip(layer.units, keep.tolist(), strict=True) if kept)
        left = layer.holding(layer.weight[keep], layer.bias[keep], units=units)
        self.put(number, left, after.holding(after.weight[:, wide], after.bias))
        self.states[layer.path] = self.states[layer.path][keep]

    def say(
        self, layer: Layer, unit: int, what: str, into: Mapping[str, float] | None = None
    ) -> None:
        """Note that an output of a layer is removed."""
        entry: dict[str, Any] = {"layer": layer.origin, "unit": layer.units[unit], "what": what}
        if into:
            entry["into"] = dict(into)
        self.removed.append(entry)


def shrink(chain: Chain, states: Mapping[str, Tensor], merge: bool = True) -> Shrunk:
    """Return a chain without its stable and dependent units, and what was done.

    Args:
        chain: from `read_chain`.
        states: layer path -> int64 [outputs]: -1 never on, 1 always on, else unknown.
        merge: also remove what has to be added to others; else only what is never on.
    """
    made = Shrunk(chain, {path: state.clone() for path, state in states.items()})
    number = 0
    while number < len(made.chain.layers) - 1:
        layer = made.chain.layers[number]
        if layer.why or layer.path not in made.states:
            number += 1
            continue
        if not _inactive(made, number):
            number += 1
            continue
        plain = merge and layer.plain and made.chain.layers[number + 1].step.op == "linear"
        if plain:
            _proportional(made, number)
            if not _dependent(made, number):
                number += 1
                continue
            if _fold(made, number):
                continue  # the same place has another layer now
        number += 1
    return made


def _inactive(made: Shrunk, number: int) -> bool:
    """Remove what is never on; return whether anything is left to look at."""
    layer = made.chain.layers[number]
    off = made.states[layer.path] == INACTIVE
    if not bool(off.any()):
        return True
    if bool(off.all()):
        return _constant(made, number, "inactive")
    for unit in off.nonzero().flatten().tolist():
        made.say(layer, unit, "inactive")
    made.drop(number, ~off)
    return True


def _constant(made: Shrunk, number: int, what: str) -> bool:
    """No unit of a layer does anything: keep one of each layer, and the value of the network."""
    layer, rest = made.chain.layers[number], made.chain.layers[number + 1 :]
    if all(after.step.op == "linear" for after in rest):
        zero = torch.zeros(1, rest[0].weight.shape[1], dtype=torch.float64)
        if what != "inactive":
            zero = zero + layer.bias.relu()
        value = run(made.chain.steps()[_place(made.chain, number + 1) :], zero)[0]
        for i, one in enumerate(made.chain.layers[:-1]):
            if not one.why and one.path in made.states:
                for unit in range(1, len(one.weight)):
                    made.say(one, unit, what if i == number else "constant")
                keep = torch.zeros(len(one.weight), dtype=torch.bool)
                keep[0] = True
                made.drop(i, keep)
            one = made.chain.layers[i]
            made.put(i, one.holding(torch.zeros_like(one.weight), torch.zeros_like(one.bias)))
            if one.path in made.states:
                made.states[one.path] = torch.full((len(one.weight),), INACTIVE)
        last = made.chain.layers[-1]
        end = last.holding(torch.zeros_like(last.weight), value)
        made.put(len(made.chain.layers) - 1, end)
    elif what == "inactive" and len(layer.weight) > 1:
        for unit in range(1, len(layer.weight)):
            made.say(layer, unit, "inactive")
        keep = torch.zeros(len(layer.weight), dtype=torch.bool)
        keep[0] = True
        made.drop(number, keep)
    return False


def _place(chain: Chain, number: int) -> int:
    """Return the index of a layer's own step among all steps."""
    return len(chain.before) + sum(1 + len(layer.after) for layer in chain.layers[:number])


def _proportional(made: Shrunk, number: int) -> None:
    """Merge units that are multiples of another, wherever the input lies."""
    layer, after = made.chain.layers[number], made.chain.layers[number + 1]
    rows = torch.cat([layer.weight, layer.bias[:, None]], 1)
    norms = rows.norm(dim=1)
    sure = layer.weight.norm(dim=1) > 0  # others are numbers: they are on or off for good
    unit = rows / torch.where(sure, norms, torch.ones_like(norms))[:, None]
    close = 4 * torch.finfo(torch.float32).eps
    keep = torch.ones(len(rows), dtype=torch.bool)
    columns_of = after.weight.clone()
    for first, other in _alike(unit, close):
        if not (keep[first] and keep[other] and sure[first] and sure[other]):
            continue
        factor = float(norms[other] / norms[first])
        columns_of[:, first] += factor * columns_of[:, other]
        keep[other] = False
        made.say(layer, other, "proportional", {str(layer.units[first]): factor})
    if not bool(keep.all()):
        made.put(number, layer, after.holding(columns_of, after.bias))
        made.drop(number, keep)


def _alike(rows: Tensor, close: float) -> list[tuple[int, int]]:
    """Return the pairs of rows [n, columns] that are equal to `close`, of each value, in order."""
    random = torch.Generator().manual_seed(0)
    along = torch.rand(rows.shape[1], generator=random, dtype=torch.float64) + 0.5
    places = rows @ along  # equal rows lie next to each other on any line
    reach = 2 * close * float((rows.abs() @ along).max())
    order = places.argsort().tolist()
    found = []
    for i, one in enumerate(order):
        for other in order[i + 1 :]:
            if float(places[other] - places[one]) > reach:
                break
            if bool(((rows[one] - rows[other]).abs() <= close * rows[one].abs()).all()):
                found.append((min(one, other), max(one, other)))
    return sorted(found)


def _dependent(made: Shrunk, number: int) -> bool:
    """Remove units that are always on and depend on others; return whether anything is left."""
    layer, after = made.chain.layers[number], made.chain.layers[number + 1]
    on = (made.states[layer.path] == ACTIVE).nonzero().flatten()
    if not len(on):
        return True
    basis, others, factors = dependence(layer.weight[on])
    within = (factors.abs() <= LARGEST).all(1)
    if not bool(within.all()):
        count = int((~within).sum())
        made.notes.append(f"{layer.path}: {count} dependent units stay, |K| is above {LARGEST:g}")
    others, factors = others[within], factors[within]
    if not len(others):
        return True
    kept, gone = on[basis], on[others]
    if len(gone) == len(layer.weight):  # each of them is a number
        _constant(made, number, "constant")
        return False
    weight, bias = after.weight.clone(), after.bias
    weight[:, kept] += after.weight[:, gone] @ factors
    bias = bias + after.weight[:, gone] @ (layer.bias[gone] - factors @ layer.bias[kept])
    for row, unit in zip(factors, gone.tolist(), strict=True):
        into = {str(layer.units[k]): float(f) for k, f in zip(kept.tolist(), row, strict=True) if f}
        made.say(layer, unit, "dependent" if into else "constant", into)
    keep = torch.ones(len(layer.weight), dtype=torch.bool)
    keep[gone] = False
    made.put(number, layer, after.holding(weight, bias))
    made.drop(number, keep)
    return True


def dependence(rows: Tensor, tolerance: float = RANK) -> tuple[Tensor, Tensor, Tensor]:
    """Return a basis of rows, the others, and K with `others = K basis`.

    Args:
        rows: float64 [n, columns].
        tolerance: of the largest pivot.

    Returns:
        int64 [r], int64 [n - r], float64 [n - r, r]; by QR with column pivoting.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 4.0], [2.0, 2.0]]).double()
        >>> basis, others, factors = dependence(rows)
        >>> bool(torch.allclose(factors @ rows[basis], rows[others])), len(basis)
        (True, 2)
    """
    from scipy.linalg import qr, solve_triangular

    r, pivots = qr(rows.T.numpy(), mode="r", pivoting=True)
    sizes = torch.from_numpy(r).diagonal().abs()
    rank = int((sizes > tolerance * float(sizes[:1].sum())).sum())  # the first is the largest
    order = torch.from_numpy(pivots.astype("int64"))
    basis, others = order[:rank], order[rank:]
    if not rank:
        return basis, others, torch.zeros(len(others), 0, dtype=torch.float64)
    factors = torch.from_numpy(solve_triangular(r[:rank, :rank], r[:rank, rank:])).T
    size = rows.norm(dim=1).max()
    apart = (factors @ rows[basis] - rows[others]).norm(dim=1)
    factors = torch.where((apart <= 10 * tolerance * size)[:, None], factors, torch.inf)
    return basis, others, factors


def _fold(made: Shrunk, number: int) -> bool:
    """Make one of two layers between which every unit is always on; return whether it was done."""
    layer, after = made.chain.layers[number], made.chain.layers[number + 1]
    if not bool((made.states[layer.path] == ACTIVE).all()):
        return False
    weight = after.weight @ layer.weight
    bias = after.weight @ layer.bias + after.bias
    if weight.numel() > layer.weight.numel() + after.weight.numel():
        made.notes.append(f"{layer.path}: always on, but one layer instead of two would be larger")
        return False
    if all(layer.relus):  # its ReLUs can become nothing
        host, gone, relus, steps = after, [layer.path, *layer.relus], after.relus, after.after
    elif after.plain and after.relus:  # a ReLU of a ReLU is a ReLU: the first does for both
        host, gone, relus, steps = layer, [after.path], (*layer.relus, *after.relus), (
            *layer.after, *after.after
        )  # fmt: skip
    else:
        made.notes.append(f"{layer.path}: always on, but its ReLU is a call and stays")
        return False
    for unit in range(len(layer.weight)):
        made.say(layer, unit, "folded")
    one = replace(
        after.holding(weight, bias), path=host.path, after=steps, relus=relus, why=after.why
    )
    layers = (*made.chain.layers[:number], one, *made.chain.layers[number + 2 :])
    made.chain = replace(made.chain, layers=layers)
    states = made.states.pop(after.path, None)
    made.states.pop(layer.path)
    if states is not None:
        made.states[host.path] = states
    made.gone += gone
    return True
