"""What a long layer offers without data: predicted from a sample of its rows, and its largest gain.

A layer's relative spectral error needs norms of the layer and of every change. A change by rounding
is what it shrinks the weights by, `-a W`, and noise of variance `s^2` that has nothing to do with
them, whose norm is that of a random matrix: `s (sqrt(n) + sqrt(m))`. Both are read off the sample,
and the norm of W comes from a few steps of Lanczos on all of it.

Reference: Bai and Yin 1993 (the largest singular value of random matrices); Golub and Van Loan,
Matrix Computations, 10.1 (Lanczos).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lamina import codecs
from lamina.artifact.exact import exact, exact_bytes
from lamina.artifact.records import values_bytes
from lamina.codecs import blocks
from lamina.errors import SiteError
from lamina.measure.stats import Cost
from lamina.methods.base import Candidate, Method, Step
from lamina.network.lazy import Lazy
from lamina.network.sites import Site
from lamina.plan.chains import pareto, propose_site
from lamina.streaming.rounding import Array, numbers, round_to

SHORT = 1 << 16  # weights up to which a layer is looked at as a whole, by every method
WHOLE = 1 << 22  # the same for methods that were asked for by name
SAMPLE = 1 << 19  # weights of a sample
ANCHORS = 4  # steps at which a sample is really coded
LANCZOS = 10  # steps
STEPS = tuple(k / 4 for k in range(-28, 11)) + (3.0, 3.5, 4.0, 5.0, 6.0)  # log2(step / rms)
CHUNK = 1 << 24  # bytes
SAMPLED = ("rdoq", "keep")  # methods that can say from a sample what they offer


@dataclass(frozen=True)
class Measured:
    """What one pass over a layer tells.

    Args:
        rms: root mean square of all weights that are not zero, bias included.
        norm: the largest singular value `|W|`, of one group the largest.
        sample: rows `[k, width]` of the stored tensor.
        share: weights, bias included, over those in the sample.
    """

    rms: float
    norm: float
    sample: torch.Tensor
    share: float


def offers_of(
    lazy: Lazy, site: Site, methods: Sequence[Method]
) -> tuple[tuple[Candidate, ...], list[str]]:
    """Return a layer's candidates without data, and the methods that are too slow for it.

    Raises:
        SiteError: its weights are not finite.
        NetworkError: its shard cannot be read.
    """
    size = math.prod(site.shape)
    if size <= SHORT:
        return propose_site(site, weights_of(lazy, site), None, methods), []
    known = [m for m in methods if m.name in SAMPLED]
    others = [m for m in methods if m.name not in SAMPLED]
    found: list[Candidate] = []
    if known:
        measured = look_at(lazy, site)
        if any(m.name == "keep" for m in known):
            found.append(_kept(site, lazy, measured))
        if any(m.name == "rdoq" for m in known):
            found += _rounded(site, lazy, measured)
    late = [m.name for m in others if size > WHOLE]
    others = [m for m in others if m.name not in late]
    if others:
        found += propose_site(site, weights_of(lazy, site), None, others)
    return pareto(found), late


def weights_of(lazy: Lazy, site: Site) -> dict[str, torch.Tensor]:
    """Return a site's tensors."""
    names = {"weight": site.weight, "bias": site.bias}
    return {kind: lazy.tensor(name) for kind, name in names.items() if name}


def count(lazy: Lazy, site: Site) -> int:
    """Return how many parameters a site has."""
    return sum(lazy.state[name].numel() for name in (site.weight, site.bias) if name)


def look_at(lazy: Lazy, site: Site) -> Measured:
    """Read a layer once for its sums, a few times for its norm, and a few of its rows.

    Raises:
        SiteError: its weights are not finite.
    """
    squares, live = 0.0, 0
    for name in (site.weight, site.bias):
        for chunk in lazy.chunks(name, CHUNK) if name else ():
            flat = chunk.reshape(-1).float()
            squares += float(flat.double().square().sum() if flat.numel() < 1 << 16 else _dot(flat))
            live += int(torch.count_nonzero(flat))
    if not math.isfinite(squares):
        raise SiteError("the weights are not finite", site.name, "NaN or inf has no grid point")
    stored = lazy.stored[site.weight]
    width = math.prod(site.shape) // stored.rows
    rows = min(stored.rows, max(8, SAMPLE // width))
    places = torch.linspace(0, stored.rows - 1, rows).long().tolist()
    sample = torch.cat([lazy.rows(site.weight, p, p + 1) for p in places])
    share = count(lazy, site) / sample.numel()
    return Measured(math.sqrt(squares / max(1, live)), spectral_norm(lazy, site), sample, share)


def _dot(flat: torch.Tensor) -> float:
    parts = flat.split(1 << 16)  # sums of floats stay exact enough where they stay short
    return math.fsum(float(torch.dot(part, part)) for part in parts)


def spectral_norm(lazy: Lazy, site: Site) -> float:
    """Return about the largest singular value of a layer's matrices, bias included, by Lanczos."""
    groups, out, inner = site.matrix_shape
    width = math.prod(site.shape) // site.shape[0]
    bias = lazy.tensor(site.bias).float().reshape(-1) if site.bias else None
    if bias is not None and (site.transposed or bias.numel() != site.shape[0]):
        bias = None  # it goes along with the columns as stored, and is left out
    each = site.shape[0] // groups if site.op in ("linear", "conv", "conv_transpose") else 0
    draw = torch.Generator().manual_seed(0)
    wide = width + (bias is not None)
    norms = []
    for group in range(groups):
        rows = (group * each, (group + 1) * each) if groups > 1 else (0, site.shape[0])
        v = torch.randn(wide, generator=draw)
        basis = [v / v.norm()]
        diagonal: list[float] = []
        beside: list[float] = []
        for _ in range(min(LANCZOS, wide, out * inner)):
            u = _gram(lazy, site.weight, rows, bias, basis[-1])
            diagonal.append(float(u @ basis[-1]))
            for b in basis:  # once more than the theory needs: rounding brings back what was left
                u -= (u @ b) * b
            for b in basis:
                u -= (u @ b) * b
            length = float(u.norm())
            if length <= 1e-6 * max(diagonal):
                break
            beside.append(length)
            basis.append(u / length)
        beside = beside[: len(diagonal) - 1]
        T = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        norms.append(math.sqrt(max(0.0, float(np.linalg.eigvalsh(T)[-1]))))
    return max(norms)


def _gram(
    lazy: Lazy, name: str, rows: tuple[int, int], bias: torch.Tensor | None, v: torch.Tensor
) -> torch.Tensor:
    """Return `W^T W v` of rows of a tensor, with the bias as its last column."""
    u = torch.zeros_like(v)
    width = len(v) - (bias is not None)
    step = max(1, CHUNK // (4 * width))
    for first in range(rows[0], rows[1], step):
        last = min(first + step, rows[1])
        W = lazy.rows(name, first, last).float()
        y = W @ v[:width]
        if bias is not None:
            y += v[-1] * bias[first:last]
            u[-1] += y @ bias[first:last]
        u[:width] += y @ W
    return u


def _rounded(site: Site, lazy: Lazy, measured: Measured) -> list[Candidate]:
    """Return what `rdoq` offers, from the sample."""
    W = numbers(measured.sample).astype(np.float64)
    whole = float((W * W).sum())
    rms = measured.rms or 1.0
    _, out, inner = site.matrix_shape
    edge = math.sqrt(out) + math.sqrt(inner)
    steps = [float(np.float32(rms * 2**k)) for k in (STEPS if whole else (0.0,))]
    quick, errors = [], []
    for step in steps:
        q = round_to(W, step)
        quick.append(codecs.estimate(q))
        change = q * step - W
        shrunk = -float((change * W).sum()) / whole if whole else 0.0
        noise = float(np.square(change + shrunk * W).mean())
        lost = (shrunk * measured.norm) ** 2 + noise * edge**2
        errors.append(math.sqrt(lost) / measured.norm if measured.norm else 0.0)
    # Where next to nothing is left the estimate is a few bytes, and says nothing by its ratio.
    firm = sum(size > W.size / 64 for size in quick)
    sizes = codecs.anchored(quick[:firm], lambda i: _length(round_to(W, steps[i])), ANCHORS)
    sizes += quick[firm:]
    params = count(lazy, site)
    return [
        Candidate(
            site.name,
            (Step("rdoq", site.name, {"step": step, "rate": 0.0, "scale": "none"}),),
            Cost(params, 8 * (size * measured.share + 4 * (1 + bool(site.bias))), site.macs),
            min(error, 1.0),
        )
        for step, size, error in zip(steps, sizes, errors, strict=True)
    ]


def _length(symbols: Array) -> float:
    """Return the bytes of symbols that stand for many more: `adaptive` will not be run on those."""
    return float(blocks.length(symbols))


def _kept(site: Site, lazy: Lazy, measured: Measured) -> Candidate:
    """Return what it costs to keep a layer, from the sample."""
    sample = measured.sample
    zeros = float((sample == 0).double().mean())
    size = exact_bytes(exact(sample))
    if zeros > 0.05:
        pattern = codecs.length((sample != 0).to(torch.int32).numpy())
        size = min(size, pattern + values_bytes(sample[sample != 0]))
    cost = Cost(count(lazy, site), 8 * size * measured.share, site.macs)
    return Candidate(site.name, (Step("keep", site.name),), cost, 0.0)
