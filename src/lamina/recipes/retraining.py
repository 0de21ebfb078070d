"""Retraining between the steps of a recipe: `train.recover`, without rate pressure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lamina.data import Data
from lamina.errors import DataError
from lamina.forms import Edit, find_tensor, install
from lamina.network.sites import Site
from lamina.network.source import Network
from lamina.plan.apply import Edited, copy_module
from lamina.recipes.pruning import at_round, pruned
from lamina.recipes.settings import Pruning
from lamina.train import Recovery, recover

EPOCHS = 10_000  # of the training data between one training and the next
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def scaled_dropout(rate: float, left: float, before: float) -> float:
    """Return the rate for a layer of which `left` of `before` connections are left.

    Reference: Han, Pool, Tran, Dally 2015, arXiv:1506.02626, eq. 2: `D_r = D_o sqrt(C_r / C_o)`.

    Example:
        >>> scaled_dropout(0.5, 25, 100), scaled_dropout(0.5, 100, 100)
        (0.25, 0.5)
    """
    return rate * (left / before) ** 0.5 if before else rate


@contextmanager
def dropout_scaled(module: nn.Module, left: Mapping[str, float]) -> Iterator[None]:
    """Scale the rate of every dropout layer by what is left of the layer it feeds, and undo it.

    What it feeds is the next layer in the order of the module tree; the last one has only the layer
    before it to go by. Calls of `torch.nn.functional.dropout` have a rate nobody can reach.

    Args:
        module: the network that will be trained.
        left: share of the connections that is left, by module path of the layer.
    """
    order = [(name, m) for name, m in module.named_modules()]
    kept: list[tuple[nn.Module, float]] = []
    try:
        for i, (_, m) in enumerate(order):
            if not isinstance(m, DROPOUTS):
                continue
            after = [left[name] for name, _ in order[i:] if name in left]
            ahead = [left[name] for name, _ in order[:i] if name in left]
            share = after[0] if after else (ahead[-1] if ahead else 1.0)
            kept.append((m, m.p))
            m.p = scaled_dropout(m.p, share, 1.0)
        yield
    finally:
        for m, rate in kept:
            m.p = rate  # type: ignore[assignment]


class LaterEpochs:
    """A loader whose epochs are counted from a later one, so that no two trainings are alike.

    Args:
        loader: with `set_epoch`.
        first: the epoch of it that is number 0 here.
    """

    def __init__(self, loader: Any, first: int) -> None:
        self.loader, self.first = loader, first

    def set_epoch(self, epoch: int) -> None:
        """Let the next `iter()` start epoch `first + epoch` of the loader."""
        self.loader.set_epoch(self.first + epoch)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def later(data: Data, number: int, seen: int = 0) -> Data:
    """Return the data with other epochs: no two trainings, and no two seeds, see the same order.

    Args:
        data: for training.
        number: of the training.
        seen: epochs of it that are done.
    """
    if not hasattr(data.train, "set_epoch"):
        return data
    return replace(data, train=LaterEpochs(data.train, number * EPOCHS + seen))


def add_phase(
    history: list[dict[str, float]], rows: Iterable[Mapping[str, float]], phase: float
) -> None:
    """Append the rows of one more training; steps are counted on."""
    start = history[-1]["step"] if history else 0.0
    history += [{**row, "step": start + row["step"], "phase": phase} for row in rows]


@dataclass
class Session:
    """What a recipe works on: the original, and its latest state, trained phase by phase."""

    original: Network
    data: Data
    seed: int
    pruning: Pruning
    say: Callable[..., None]
    edited: Edited = field(init=False)
    history: list[dict[str, float]] = field(default_factory=list)
    phases: int = 0
    seen: int = 0  # epochs

    def __post_init__(self) -> None:
        network = replace(self.original, module=copy_module(self.original.module))
        self.edited = Edited(network, ())

    @property
    def module(self) -> nn.Module:
        return self.edited.model

    def hold(self, edits: Iterable[Edit]) -> None:
        """Put values into the network; what was held before stays held, but for these tensors."""
        new = {e.path: e for e in edits}
        install(self.module, new.values())
        old = [e for e in self.edited.edits if e.path not in new]
        self.edited = replace(self.edited, edits=(*old, *new.values()))

    def values(self, path: str) -> Any:
        """Return the values that are held of a tensor."""
        return next(e.values for e in self.edited.edits if e.path == path)

    def prune(self, layers: Sequence[Site], shares: Mapping[str, float]) -> None:
        """Prune to these shares in rounds, and retrain the survivors after each.

        Args:
            layers: to prune.
            shares: of its weights that a layer keeps in the end, by site name.
        """
        pruning = self.pruning
        for number in range(1, pruning.rounds + 1):
            now = {n: at_round(s, number, pruning.rounds) for n, s in shares.items()}
            self.hold(pruned(self.module, layers, now))
            ends = number == pruning.rounds
            self.train(pruning.last if ends else pruning.epochs, pruning.lr, layers)

    def fork(self) -> Session:
        """Return a session that goes on from here without changing this one."""
        other = replace(self)
        network = replace(self.edited.network, module=copy_module(self.module))
        other.edited, other.phases = Edited(network, self.edited.edits), self.phases
        other.history = list(self.history)
        return other

    def train(
        self, epochs: float, lr: float, sites: Sequence[Site] = (), frozen: Sequence[str] = ()
    ) -> None:
        """Train what is held, in the form it is held in.

        Args:
            epochs: passes over the training data; 0: none.
            lr: peak learning rate.
            sites: layers, for the scaling of dropout.
            frozen: names of tensors that must not change.
        """
        if not epochs:
            return
        self.phases += 1
        recovery = Recovery(
            epochs=epochs,
            lr=lr,
            distill=self.pruning.distill,
            decay=self.pruning.decay,
            rate=False,
            seed=self.seed + self.phases,
        )
        model = self.edited.model
        left = {site.module: self._left(site) for site in sites}
        fixed = [find_tensor(model, name) for name in frozen]
        were = [t.requires_grad for t in fixed]
        for tensor in fixed:
            tensor.requires_grad_(False)
        if frozen and not any(p.requires_grad for p in model.parameters()):
            for tensor, was in zip(fixed, were, strict=True):
                tensor.requires_grad_(was)
            return  # the last layer is done
        data = later(self.data, self.seed, self.seen)
        with dropout_scaled(model, left):
            result = recover(self.original, self.edited, data, recovery, progress=self.say)
        self.seen += math.ceil(epochs)
        rates = [m.p for m in model.modules() if isinstance(m, DROPOUTS)]
        new = result.edited.model
        for m, rate in zip(
            (m for m in new.modules() if isinstance(m, DROPOUTS)), rates, strict=True
        ):
            m.p = rate
        for name, was in zip(frozen, were, strict=True):
            find_tensor(new, name).requires_grad_(was)
        add_phase(self.history, result.history, float(self.phases))
        self.edited = result.edited

    def _left(self, site: Site) -> float:
        """Return the share of a layer's weights that are not zero."""
        weight = find_tensor(self.module, site.weight)
        return float((weight != 0).sum()) / max(1, weight.numel())


def check_data(data: Data | None, name: str) -> Data:
    """Return the data.

    Raises:
        DataError: there is no training data, and a recipe trains.
    """
    if data is None or data.train is None:
        raise DataError(
            f"the recipe {name} needs training data", "data.train", "it retrains after every step",
            "give data with a train loader",
        )  # fmt: skip
    return data
