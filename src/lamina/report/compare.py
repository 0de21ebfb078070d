"""What a report measures on the networks themselves: errors, quality and latency."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamina.data import Data
from lamina.errors import DataError, FileError
from lamina.forms import Edit, find_tensor, install
from lamina.measure.bench import tokens_of
from lamina.measure.cost import latency
from lamina.measure.forward import Batch, at_rest, batches, call
from lamina.measure.loss import Loss, decide_loss, divergence
from lamina.measure.probe import OUTPUTS, Probe, collect_probe
from lamina.measure.quality import evaluate, fidelity, metric_named
from lamina.network.source import Network, main_output
from lamina.plan.apply import copy_module

SAMPLES = 500  # that errors are measured on
FEWEST = 16  # samples below which an error is not worth measuring
SITES = 60  # above so many, errors are not measured site by site
WORK = 4e11  # multiply-accumulates that all errors together may take: about 20 s of one core
ROUNDS, TIME = 31, 3.0  # of latency: interleaved rounds, and what they may take in all [s]


@dataclass(frozen=True)
class Reference:
    """Inputs, and what the original made of them.

    Args:
        probes: batches with the original's outputs.
        loss: what the outputs are.
    """

    probes: tuple[Probe, ...]
    loss: Loss

    @property
    def samples(self) -> int:
        return sum(p.batch.size for p in self.probes)

    def error(self, module: nn.Module) -> float:
        """Return how far a network is from the original [nats per sample]; features: 1/2 |dy|^2."""
        total = 0.0
        with at_rest(module), torch.no_grad():
            for probe in self.probes:
                output = main_output(call(module, probe.batch)).to(probe.reference.device)
                total += float(
                    divergence(self.loss, probe.reference, output, probe.batch.mask).sum()
                )
        return total / self.samples


def affordable(macs: float, runs: int) -> int:
    """Return how many samples the networks can be run on, `runs` times in all.

    Example:
        >>> affordable(2e6, 7), affordable(4e9, 100)
        (500, 1)
    """
    return int(min(SAMPLES, WORK / max(1.0, macs * runs)))


def take_reference(network: Network, loader: Iterable[Any], samples: int) -> Reference:
    """Run the original on the first samples of a loader, and keep its outputs.

    Raises:
        DataError: no batches, or the network does not take them.
    """
    probes: list[Probe] = []
    decided: Loss | None = None
    room, elements = samples, 0
    with at_rest(network.module), torch.no_grad():
        for batch in batches(network.module, loader, samples):
            raw = call(network.module, batch, network.example_inputs)
            output = main_output(raw)
            decided = decided or decide_loss(network.loss, raw, output, batch.labels)
            probes += collect_probe(batch, output, room)
            room -= probes[-1].batch.size if probes else 0
            elements += probes[-1].reference.numel() if probes else 0
            if room <= 0 or elements > OUTPUTS:
                break
    if decided is None or not probes:
        raise DataError("no batches", "data", "it is empty", "give at least one batch")
    return Reference(tuple(probes), decided)


def site_errors(
    network: Network, edits: Mapping[str, tuple[Edit, ...]], reference: Reference
) -> dict[str, float]:
    """Measure the error of each site's edits alone.

    Args:
        network: the original, which is not changed.
        edits: by site name.
        reference: what to measure on.

    Returns:
        by site name, the error [nats per sample].
    """
    trial = copy_module(network.module)
    found: dict[str, float] = {}
    for name, own in edits.items():
        with installed(trial, own):
            found[name] = reference.error(trial)
    return found


@contextmanager
def installed(root: nn.Module, edits: Iterable[Edit]) -> Iterator[None]:
    """Put edits into a network, and take them out again."""
    edits = tuple(edits)
    modules: list[tuple[str, nn.Module]] = []
    held: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
    kept: list[tuple[Tensor, Tensor]] = []
    for edit in edits:
        try:
            if edit.form == "values":
                found = [find_tensor(root, edit.path)]
            else:  # a form may take the tensors of the module it replaces with it
                modules.append((edit.path, root.get_submodule(edit.path)))
                held.append((modules[-1][1], dict(modules[-1][1]._parameters)))  # a tie changes it
                found = list(modules[-1][1].state_dict(keep_vars=True).values())
        except (FileError, AttributeError):  # it lies inside a module that an earlier edit puts in
            continue
        kept += [(t, t.detach().clone()) for t in found]
    try:
        install(root, edits)
        yield
    finally:
        for path, module in reversed(modules):
            parent, _, leaf = path.rpartition(".")
            setattr(root.get_submodule(parent), leaf, module)
        for module, parameters in reversed(held):
            module._parameters.update(parameters)
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


def measure_quality(
    network: Network, data: Data | None, metric: Any, edited: nn.Module, final: nn.Module
) -> dict[str, Any]:
    """Return the metric and the fidelity of the original, the edited and the final network.

    The test split is only reported; nothing is decided by it.

    Raises:
        DataError: the metric cannot be measured, or is not a number.
    """
    judged = metric_named(metric)
    facts: dict[str, Any] = {
        "metric": judged.name,
        "unit": judged.unit,
        "validation": None,
        "test": None,
        "fidelity": None,
    }
    if data is None:
        return facts

    def value(module: nn.Module, loader: Iterable[Any]) -> float:
        return evaluate(module, loader, judged, original=network)

    if data.validation is not None:
        before, after = value(network.module, data.validation), value(final, data.validation)
        applied = after if edited is final else value(edited, data.validation)
        facts["validation"] = {
            "before": before,
            "applied": applied,
            "after": after,
            "drop": judged.drop(before, after),
            "applied_drop": judged.drop(before, applied),
        }
    if data.test is not None:
        before, after = value(network.module, data.test), value(final, data.test)
        facts["test"] = {"before": before, "after": after, "drop": judged.drop(before, after)}
    loader = data.validation if data.validation is not None else data.calibration
    if loader is not None:
        close = _fidelity(network, final, loader)
        far = close if edited is final else _fidelity(network, edited, loader)
        facts["fidelity"] = {"applied": far, "after": close}
    return facts


def _fidelity(network: Network, module: nn.Module, loader: Iterable[Any]) -> dict[str, Any]:
    return asdict(fidelity(network, module, loader))


class _Bound(nn.Module):
    """A network with its keyword inputs given; what is left is called with positional ones."""

    def __init__(self, inner: nn.Module, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner, self.kwargs = inner, dict(kwargs)

    def forward(self, *args: Any) -> Any:
        return self.inner(*args, **self.kwargs)


def measure_latency(network: Network, final: nn.Module) -> tuple[dict[str, Any] | None, str]:
    """Time the original and the final network in turn: one sample, one thread.

    Returns:
        the facts, or None and why nothing was measured.
    """
    args, kwargs = network.example_inputs, dict(network.example_kwargs)
    if not args and not kwargs:
        return None, "no example inputs"
    whole = Batch(tuple(args), kwargs, None, _length(args, kwargs))
    one = whole.head(1)
    models: dict[str, nn.Module] = {"before": network.module, "after": final}
    if one.kwargs:
        models = {name: _Bound(module, one.kwargs) for name, module in models.items()}
    try:
        with at_rest(network.module), torch.no_grad():
            once = TIME
            for _ in range(2):  # the first call also allocates
                start = time.perf_counter()
                call(models["before"], Batch(one.args, {}, None, 1))
                once = min(once, time.perf_counter() - start)
        rounds = int(min(ROUNDS, TIME / (2 * max(once, 0.02)) - 3))
        if rounds < 3:
            return None, f"one pass takes {once:.2g} s"
        found = latency(models, one.args, rounds=rounds, threads=1)
    except DataError as error:  # some networks do not take a batch of one
        return None, str(error)
    return {
        "before_s": found["before"],
        "after_s": found["after"],
        "ratio": found["before"] / max(found["after"], 1e-12),
        "batch": 1,
        "tokens": tokens_of(network),
        "rounds": rounds,
        "threads": 1,
    }, ""


def _length(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
    return len(tensors[0]) if tensors else 1
