"""The two layers of a low rank pair: their sites, and the statistics that follow from B and A."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lamina.forms.low_rank import split_axes
from lamina.measure.low_rank import damp, encoded_moments, split_moments
from lamina.measure.schemes import PLAIN, Scheme, expand, split_taps
from lamina.measure.stats import LayerStats
from lamina.methods.layers import channels_of, site_inside
from lamina.network.sites import Site


def leaf_sites(site: Site, folds: int, rank: int, scheme: int = 0) -> tuple[Site, Site]:
    """Describe the two layers of the pair, as discovery would.

    Args:
        scheme: who owns which taps; where it is not 0 the encoder runs at input resolution on the
            decoder's axes, of which the cost needs `site.extent`.
    """
    f = site.matrix_shape[1]
    conv = site.op == "conv"
    taps = Scheme(scheme, site.kernel if conv else ())
    between = _between(site, scheme)
    inside = (folds * rank, channels_of(site) // folds, *taps.encoder)
    first = site_inside(site, 0, bias="", shape=inside, groups=folds)
    second = site_inside(site, 1, shape=(f, folds * rank, *taps.decoder), groups=1)
    if not conv:
        return first, second
    positions = site.positions
    for now, full in zip(between, _output(site), strict=False):
        positions *= now / max(1, full)
    encoder, decoder = _geometry(site, scheme)
    return (
        replace(first, positions=positions, **encoder),
        replace(second, extent=between, **decoder),
    )


def leaf_stats(
    stats: LayerStats | None, encode: torch.Tensor, decode: torch.Tensor, scheme: Scheme = PLAIN
) -> tuple[LayerStats | None, LayerStats | None]:
    """Return the statistics of the two layers of a pair, from those of the whole layer.

    The decoder sees the layer's gradients, and encoded inputs: `B H B^T`, across folds and taps;
    exact. The encoder sees the layer's inputs, and gradients through the decoder: `H_i`,
    `A_i^T G A_i` per fold; exact where the encoder owns all taps. Else its input moment is the mean
    over the decoder's taps, and how these go together is weighed in (`split_moments`).

    Args:
        stats: of the dense layer; None: data-free.
        encode: `[k, j, m]`; decode: `[f, k j after]`, as stored.
        scheme: who owns which taps.
    """
    if stats is None:
        return None, None
    encode, decode = encode.to(torch.float64), decode.to(torch.float64)
    folds, rank, _ = encode.shape
    rows = expand(encode, scheme)
    H, G = stats.H[0].to(torch.float64), stats.G[0].to(torch.float64)
    inputs, taps = split_moments(H, folds, scheme)
    left = (G[:, None] * decode if G.dim() == 1 else G @ decode).reshape(
        -1, folds, rank, scheme.after
    )
    through = torch.einsum("fkjt,kts,fkls->kjl", decode.reshape(left.shape), taps, left)
    _, inner = encoded_moments(decode.new_zeros(1, folds * rows.shape[2]), H, rows)
    mean = coded = None
    if stats.mean is not None:
        whole = stats.mean[0].to(torch.float64).reshape(folds, -1)
        mean = split_taps(whole, scheme).mean(1)
        coded = torch.einsum("kja,ka->kj", rows, whole).reshape(1, -1)
    size = folds * rank * scheme.after
    before = replace(stats, H=inputs, G=through, mean=mean)
    after = replace(stats, H=inner.reshape(1, size, size), mean=coded)
    return before, after


def about_mean(stats: LayerStats) -> tuple[LayerStats, torch.Tensor | None]:
    """Return the statistics with the input moment about its mean, and the mean input `[n]`.

    A change E of the weight moves a layer's output by `E x`; a bias that moves by `-E mean(x)`
    leaves only what varies: `H - N m m^T`. None where the mean is not known well enough for that.
    """
    if stats.mean is None or stats.positions <= 0:
        return stats, None
    mean = stats.mean[0].to(torch.float64) / stats.positions
    H = stats.H[0].to(torch.float64)
    diagonal = H.dim() == 1
    outer = mean.square() if diagonal else torch.outer(mean, mean)
    rest = H - stats.positions * outer
    # Where not all positions were counted alike the rest may be no moment at all.
    spread = rest if diagonal else rest.diagonal()
    if bool((spread < 0).any()):
        return stats, None
    if not diagonal and int(torch.linalg.cholesky_ex(damp(rest)).info):
        return stats, None
    return replace(stats, H=rest[None]), mean


def shifted_bias(
    bias: torch.Tensor,
    matrix: torch.Tensor,
    mean: torch.Tensor | None,
    encode: torch.Tensor,
    decode: torch.Tensor,
    scheme: Scheme = PLAIN,
) -> torch.Tensor:
    """Return the bias that takes up the mean of what a pair loses: `b + (M - A B) mean(x)`."""
    if mean is None:
        return bias
    rows = expand(encode.to(torch.float64), scheme)
    coded = torch.einsum("kja,ka->kj", rows, mean.reshape(len(rows), -1)).reshape(-1)
    lost = matrix @ mean - decode.to(torch.float64) @ coded
    return (bias.to(torch.float64) + lost).to(bias.dtype)


def _output(site: Site) -> tuple[int, ...]:
    """Return a convolution's output sizes; `()` where its input sizes are not known."""
    if not site.extent or site.padding[:1] == ("same",):
        return site.extent
    whole = zip(site.extent, site.kernel, site.stride, site.padding, site.dilation, strict=True)
    return tuple((n + 2 * int(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in whole)


def _between(site: Site, scheme: int) -> tuple[int, ...]:
    """Return the output sizes of the encoder: those of the input where it owns no taps."""
    if not site.extent:
        return ()
    mine = split_axes((True,) * len(site.kernel), scheme, False)[0]
    sizes = zip(_output(site), site.extent, mine, strict=True)
    return tuple(out if own else full for out, full, own in sizes)


def _geometry(site: Site, scheme: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the geometry of the encoder and of the decoder: each axis with its owner."""
    encoder: dict[str, Any] = {}
    decoder: dict[str, Any] = {"padding_mode": site.padding_mode if scheme else "zeros"}
    for name, rest in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        value = getattr(site, name)
        if value == ("same",):
            encoder[name] = value
            decoder[name] = value if scheme else (0,) * len(site.kernel)
        else:
            encoder[name], decoder[name] = split_axes(value, scheme, rest)
    return encoder, decoder
