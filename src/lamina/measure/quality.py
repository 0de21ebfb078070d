"""How good a network is: the user's metric, and label-free fidelity to the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.errors import DataError, LaminaError
from lamina.measure.forward import Batch, at_rest, batches, call
from lamina.measure.loss import Loss, decide_loss, divergence, pooled
from lamina.network.source import Network, main_output

Model = nn.Module | Network
Measure = Callable[[nn.Module, Iterable[Any]], float]
IDENTICAL_DB = 300.0  # reported where the outputs do not differ at all
IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class Metric:
    """What a network is judged by.

    Args:
        name: what reports call it.
        unit: of its value: `"points"` (0-100), `"nats"`, `""`.
        higher: whether more is better.
        measure: `(module, loader) -> float`, for a user's own metric.

    Example:
        >>> metric_named("accuracy").drop(98.0, 97.5), metric_named("loss").drop(0.1, 0.3)
        (0.5, 0.19999999999999998)
    """

    name: str
    unit: str = ""
    higher: bool = True
    measure: Measure | None = None

    def drop(self, before: float, after: float) -> float:
        """Return how much worse `after` is than `before`, in the metric's unit."""
        return before - after if self.higher else after - before


METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", "points"),
    "loss": Metric("loss", "nats", higher=False),
    "perplexity": Metric("perplexity", "", higher=False),
    "agreement": Metric("agreement", "points"),
    "cosine": Metric("cosine", ""),
    "kl": Metric("kl", "nats", higher=False),
    "sqnr": Metric("sqnr", "dB"),
    "embedding": Metric("embedding", ""),
    "probe": Metric("probe", "points"),
}
LABEL_FREE = ("agreement", "cosine", "kl", "sqnr", "embedding")
COMPARED = (*LABEL_FREE, "probe")  # these need the original


@dataclass(frozen=True)
class Fidelity:
    """How close a network's outputs are to the original's; no labels involved.

    Args:
        agreement: predictions (largest output) that are the same [%].
        kl: the error in the planner's currency [nats per sample]: mean `KL(original || compressed)`
            summed over positions, or `1/2 |difference|^2` where outputs are features.
        cosine: mean cosine of the outputs, sample by sample.
        sqnr_db: power of the original over power of the difference [dB]; 300 where they are equal.
        samples: number of samples.
        loss: `"logits"`, `"features"` or `"embedding"`, which says how `kl` was measured.
        predictions: predictions per sample (tokens, pixels).
    """

    agreement: float
    kl: float
    cosine: float
    sqnr_db: float
    samples: int
    loss: str = "logits"
    predictions: float = 1.0


def metric_named(metric: str | Metric | Measure) -> Metric:
    """Return a metric by name, or wrap a user's callable `(module, loader) -> float`.

    A callable's value is taken as points, more is better, unless it has a false attribute `higher`.

    Raises:
        DataError: no metric has this name.

    Example:
        >>> metric_named("perplexity").higher
        False
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise DataError("unknown metric", repr(metric), "", f"choose from {', '.join(METRICS)}")
        return METRICS[metric]
    if not callable(metric):
        raise DataError(
            "cannot read the metric", type(metric).__name__, "", "give a name or a callable"
        )
    name = getattr(metric, "__name__", type(metric).__name__)
    return Metric(name, "points", bool(getattr(metric, "higher", True)), metric)


def evaluate(
    module: Model,
    loader: Iterable[Any],
    metric: str | Metric | Measure = "accuracy",
    *,
    original: Model | None = None,
) -> float:
    """Measure a network's metric over a loader, in evaluation mode, and leave it as it was.

    Args:
        module: the network.
        loader: batches; labelled ones for accuracy, loss and perplexity.
        metric: a name (`"accuracy"` in points 0-100, `"loss"` in nats a prediction,
            `"perplexity"`, `"agreement"`, `"cosine"`, `"kl"`, `"sqnr"`, `"embedding"`: mean cosine
            of the means over a sample's tokens, `"probe"`: see `linear_probe`) or a callable
            `(module, loader) -> float`.
        original: the uncompressed network, for those that compare with it.

    Raises:
        DataError: no labels where they are needed, labels that do not fit the outputs, a metric
            that raises, or gives no finite number.

    Example:
        >>> batch = (torch.eye(3), torch.tensor([0, 1, 1]))
        >>> round(evaluate(nn.Identity(), [batch]), 2)
        66.67
    """
    wanted, network = metric_named(metric), _module_of(module)
    if wanted.name in COMPARED and wanted.measure is None:
        if original is None:
            raise DataError(
                "no original to compare with", f"metric {wanted.name!r}", "", "pass original="
            )
        if wanted.name == "probe":
            from lamina.measure.linear_probe import linear_probe

            return linear_probe(_module_of(original), network, loader)
        if wanted.name == "embedding":
            return fidelity(original, network, loader, loss="embedding").cosine
        found = fidelity(original, network, loader)
        return found.sqnr_db if wanted.name == "sqnr" else float(getattr(found, wanted.name))
    with at_rest(network):
        if wanted.measure is None:
            value = _supervised(wanted.name, network, loader)
        else:
            with torch.no_grad():
                value = _number(wanted, _call(wanted, network, loader))
    if math.isnan(value) or (math.isinf(value) and wanted.name != "perplexity"):
        raise DataError(
            "the metric is not a number",
            f"metric {wanted.name!r}",
            f"it returned {value}",
            "check the metric, the labels and the network's weights",
        )
    return value


def fidelity(
    original: Model, compressed: Model, loader: Iterable[Any], *, loss: str = "auto"
) -> Fidelity:
    """Compare two networks' outputs in one pass over a loader; labels are not needed.

    Args:
        original: the uncompressed network.
        compressed: the other; it may stand on another device.
        loader: batches; their labels only help to tell what the outputs are.
        loss: `"logits"`, `"features"`, `"embedding"`, or `"auto"` (see `measure.loss.decide_loss`).

    Raises:
        DataError: no batches, or outputs of different shapes.

    Example:
        >>> fidelity(nn.Identity(), nn.Identity(), [torch.eye(3)]).cosine
        1.0
    """
    if loss == "auto" and isinstance(original, Network):
        loss = original.loss
    first, second = _module_of(original), _module_of(compressed)
    sums = dict.fromkeys(("same", "predictions", "kl", "cosine", "signal", "noise"), 0.0)
    samples, decided = 0, Loss("features")
    with at_rest(first, second), torch.no_grad():
        pairs = zip(batches(first, loader), batches(second, loader), strict=True)
        if iter(loader) is loader:  # a one-shot iterator cannot be read twice
            shared = list(loader)
            pairs = zip(batches(first, shared), batches(second, shared), strict=True)
        for ours, theirs in pairs:
            raw = call(first, ours)
            a = main_output(raw)
            b = main_output(call(second, theirs)).to(a.device)
            if a.shape != b.shape:
                raise DataError(
                    "outputs differ in shape",
                    f"{list(a.shape)} and {list(b.shape)}",
                    "",
                    "compare a network with its own compressed form",
                )
            if samples == 0:
                decided = decide_loss(loss, raw, a, ours.labels)
            samples += ours.size
            for key, value in _compare(decided, a, b, ours).items():
                sums[key] += value
    noise, signal = sums["noise"], sums["signal"]
    finite = math.isfinite(noise) and signal > 0 and noise > 0
    return Fidelity(
        agreement=100 * sums["same"] / max(1.0, sums["predictions"]),
        kl=sums["kl"] / samples,
        cosine=sums["cosine"] / samples,
        sqnr_db=10 * math.log10(signal / noise) if finite else (0.0 if noise else IDENTICAL_DB),
        samples=samples,
        loss=decided.kind,
        predictions=sums["predictions"] / samples,
    )


def _compare(loss: Loss, a: Tensor, b: Tensor, batch: Batch) -> dict[str, float]:
    mask = batch.mask
    if loss.kind == "embedding":
        a, b, mask = pooled(a, mask), pooled(b, mask), None
    axis = loss.axis if loss.kind == "logits" else -1
    same = a.argmax(axis) == b.argmax(axis)
    counted = torch.ones_like(same)
    if mask is not None and tuple(mask.shape) == tuple(same.shape[:2]):
        counted &= mask.bool().reshape(*mask.shape, *[1] * (same.dim() - 2))
    x, y = (_counted(v, mask).double().flatten(1) for v in (a, b))
    norms = (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-300)
    equal = (x == y).all(1)
    cosine = torch.where(equal, torch.ones_like(norms), (x * y).sum(1) / norms)
    return {
        "same": float((same & counted).sum()),
        "predictions": float(counted.sum()),
        "kl": float(divergence(loss, a, b, mask).sum()),
        "cosine": float(cosine.sum()),
        "signal": float(x.square().sum()),
        "noise": float((x - y).square().sum()),
    }


def _counted(output: Tensor, mask: Tensor | None) -> Tensor:
    """Return outputs `[samples, tokens, ...]` with nothing where a token does not count."""
    if mask is None or tuple(mask.shape) != tuple(output.shape[:2]):
        return output
    keep = mask.bool().reshape(*mask.shape, *[1] * (output.dim() - 2))
    return output.masked_fill(~keep, 0)


def _supervised(name: str, module: nn.Module, loader: Iterable[Any]) -> float:
    """Return accuracy [points], mean loss [nats] or perplexity from labelled batches."""
    right = total = loss = 0.0
    with torch.no_grad():
        for batch in batches(module, loader):
            if batch.labels is None:
                raise DataError(
                    "no labels",
                    f"metric {name!r}",
                    "the batches hold inputs only",
                    "give (x, y) batches, or a label-free metric such as 'agreement'",
                )
            raw = call(module, batch)
            output = main_output(raw)
            if batch.labels.is_floating_point():
                if name == "accuracy" or batch.labels.shape != output.shape:
                    raise _misfit(name, output, batch.labels)
                loss += float((output.double() - batch.labels.double()).square().sum())
                total += output.numel()
                continue
            logits, labels = _aligned(name, raw, output, batch)
            keep = labels != IGNORED
            logits, labels = logits[keep], labels[keep]
            right += float((logits.argmax(-1) == labels).sum())
            if name != "accuracy" and len(labels):
                loss += float(F.cross_entropy(logits.double(), labels.long(), reduction="sum"))
            total += len(labels)
    if total == 0:
        raise DataError("no labels that count", f"metric {name!r}", "all are ignored")
    if name == "accuracy":
        return 100 * right / total
    mean = loss / total
    return math.exp(min(mean, 700.0)) if name == "perplexity" else mean


def _aligned(name: str, raw: Any, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits `[n, classes]` and labels `[n]`; a causal language model's are shifted."""
    labels = batch.labels
    assert labels is not None
    loss = decide_loss("auto", None, output, labels)
    if loss.kind != "logits":
        raise _misfit(name, output, labels)
    logits = output.movedim(loss.axis, -1)
    labels = labels.reshape(logits.shape[:-1])
    tokens = next((v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)), None)
    if labels.dim() == 2 and tokens is not None and tokens.shape == labels.shape:
        kept = labels != IGNORED
        if not tokens.is_floating_point() and bool((tokens == labels)[kept].all()):
            logits, labels = logits[:, :-1], labels[:, 1:]  # the label of a token is the next one
    return logits.flatten(0, -2), labels.flatten()


def _misfit(name: str, output: Tensor, labels: Tensor) -> DataError:
    return DataError(
        "labels do not fit the outputs",
        f"metric {name!r}",
        f"output {list(output.shape)}, labels {list(labels.shape)} {labels.dtype}",
        "give class labels of the outputs' shape, or a metric of your own",
    )


def _call(metric: Metric, network: nn.Module, loader: Iterable[Any]) -> Any:
    assert metric.measure is not None
    try:
        return metric.measure(network, loader)
    except LaminaError:
        raise
    except Exception as error:  # whatever a user's function may raise
        raise DataError(
            "the metric raised an error", f"metric {metric.name!r}",
            f"{type(error).__name__}: {error}", "a metric is called with (module, loader)",
        ) from error  # fmt: skip


def _number(metric: Metric, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            "the metric is not a number",
            f"metric {metric.name!r}",
            f"it returned {type(value).__name__}",
            "return a float",
        ) from error


def _module_of(model: Model) -> nn.Module:
    return model.module if isinstance(model, Network) else model
