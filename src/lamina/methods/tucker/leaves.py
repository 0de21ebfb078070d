"""The three layers of a Tucker-2 form: where they lie, what they see, and what the loss feels."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from lamina.measure.stats import LayerStats
from lamina.measure.tucker import encoded, metric_of
from lamina.methods.layers import site_inside
from lamina.network.sites import Site

# --- sizes ---------------------------------------------------------------------------------------


def output_extent(site: Site) -> tuple[int, ...]:
    """Return the spatial sizes of a convolution's output; `()` where its input's are not known.

    Example:
        >>> site = Site("c", op="conv", kernel=(3,), stride=(2,), padding=(1,), dilation=(1,))
        >>> output_extent(replace(site, extent=(9,)))
        (5,)
    """
    if site.padding == ("same",):
        return site.extent
    return tuple(
        (e + 2 * int(p) - d * (k - 1) - 1) // s + 1
        for e, k, s, p, d in zip(
            site.extent,
            site.kernel,
            site.stride,
            site.padding,
            site.dilation,
            strict=bool(site.extent),
        )
    )


def input_positions(site: Site) -> float | None:
    """Return the positions per sample of a convolution's input; None where they are not known."""
    if keeps_size(site):
        return site.positions
    outputs = math.prod(output_extent(site))
    if not site.extent or outputs < 1:
        return None
    return site.positions * math.prod(site.extent) / outputs


def keeps_size(site: Site) -> bool:
    """Whether a convolution's output is as large as its input, whatever that is."""
    spans = [d * (k - 1) for k, d in zip(site.kernel, site.dilation, strict=True)]
    padded = site.padding == ("same",) or [2 * int(p) for p in site.padding] == spans
    return padded and all(s == 1 for s in site.stride)


# --- the layers that are left --------------------------------------------------------------------


def leaf_sites(site: Site, r1: int, r2: int) -> tuple[Site, Site, Site]:
    """Describe the three layers, as discovery would."""
    f, c = site.shape[:2]
    ones, zeros = (1,) * len(site.kernel), (0,) * len(site.kernel)
    core = site_inside(site, 1, bias="", shape=(r1, r2, *site.kernel))
    flat = replace(
        core, kernel=ones, stride=ones, padding=zeros, dilation=ones, padding_mode="zeros"
    )
    positions = input_positions(site) or 0.0
    first = site_inside(site, 0, flat, bias="", shape=(r2, c, *ones), positions=positions)
    last = site_inside(site, 2, flat, shape=(f, r1, *ones), extent=output_extent(site))
    return first, core, last


def leaf_stats(
    site: Site,
    stats: LayerStats | None,
    decode: torch.Tensor,
    core: torch.Tensor,
    encode: torch.Tensor,
) -> tuple[LayerStats | None, LayerStats | None, LayerStats | None]:
    """Return the statistics of the three layers, from those of the whole layer.

    Core and decoder: exact. The core sees encoded patches, `B H B^T`, and gradients through the
    decoder, `A^T G A`; the decoder sees the core's outputs, and the layer's gradients. The first
    layer's error is `sum_kl tr(C_k^T A^T G A C_l dB H_kl dB^T) / 2` over pairs of taps, which no
    Kronecker product gives; it gets the inputs' own moment, and the gradient moment for which the
    error is right in the mean for changes of independent entries (rounding, say).

    Args:
        site: the layer; stats: of it; None: data-free.
        decode `[f, r1]`, core `[r1, r2, K]`, encode `[r2, c]`: as stored.
    """
    if stats is None:
        return None, None, None
    decode, core, encode = (t.to(torch.float64) for t in (decode, core, encode))
    (f, r1), (_, r2, taps), c = decode.shape, core.shape, encode.shape[1]
    true = metric_of(stats, (f, c, taps), damped=False)
    _, inside = encoded(encode.new_zeros(1, c, taps), true.H, encode).parts()
    flat = core.permute(2, 0, 1) if len(inside) > 1 else core.reshape(1, r1, -1)
    seen = (flat @ inside @ flat.mT).sum(0)
    if len(inside) > 1:  # tap by tap: a block-diagonal moment, channels first
        inside = torch.einsum("kab,kl->akbl", inside, torch.eye(taps).to(inside))
    inside = inside.reshape(1, r2 * taps, r2 * taps)
    through = decode.mT @ true.G @ decode
    between = mean = coded = None
    if stats.mean is not None:
        mean = stats.mean[0].to(torch.float64).reshape(c, taps)
        between = encode @ mean
        coded = torch.einsum("ijk,jk->i", core, between)[None]
        between = between.reshape(1, -1)
    pixels, mean, power = _pixels(site, true.H, mean)
    pairs = torch.einsum("iak,ij,jbl->akbl", core, through, core)
    back = torch.einsum("akbl,kl->ab", pairs, power)
    scale = (input_positions(site) or site.positions) / max(site.positions, 1e-300)
    first = replace(
        stats, H=pixels[None], G=back[None], mean=mean, positions=stats.positions * scale
    )
    return (
        first,
        replace(stats, H=inside, G=through[None], mean=between),
        replace(stats, H=seen[None], mean=coded),
    )


def _pixels(
    site: Site, H: torch.Tensor, mean: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return the moment `[c, c]` and the mean `[1, c]` of single pixels, and taps' powers over it.

    A tap that sees every pixel once has both. Elsewhere (a stride, no padding) it is the mean over
    what all taps see of the input, times its pixels.
    """
    taps = H.shape[1]
    if H.dim() == 2:
        blocks, power = torch.diag_embed(H.mT), torch.diag(H.sum(0))
    else:
        blocks, power = torch.einsum("akbk->kab", H), torch.einsum("akal->kl", H)
    whole = _whole_tap(site)
    if whole is not None:
        pixels, first = blocks[whole], None if mean is None else mean[:, whole]
    else:
        share = (input_positions(site) or site.positions) / max(site.positions, 1e-300)
        share /= max(_inside(site), 1e-9) * taps
        pixels, first = blocks.sum(0) * share, None if mean is None else mean.sum(1) * share
    trace = pixels.diagonal().sum().clamp_min(1e-300)
    return pixels, None if first is None else first[None], power / trace


def _whole_tap(site: Site) -> int | None:
    """Return the index of the tap that lies over the output's own position, if it sees all."""
    if not keeps_size(site):
        return None
    index = 0
    for k, d in zip(site.kernel, site.dilation, strict=True):
        place, odd = divmod(d * (k - 1) // 2, d)
        if odd:
            return None
        index = index * k + place
    return index


def _inside(site: Site) -> float:
    """Return the share of all taps' positions that lie on the input, not on its padding."""
    if not site.extent or site.padding_mode != "zeros":
        return 1.0
    share = 1.0
    axes = zip(
        site.extent, output_extent(site), site.kernel, site.stride, site.dilation, strict=True
    )
    for i, (size, out, k, s, d) in enumerate(axes):
        before = d * (k - 1) // 2 if site.padding == ("same",) else int(site.padding[i])
        places = [o * s + t * d - before for o in range(out) for t in range(k)]
        share *= sum(0 <= p < size for p in places) / len(places)
    return share
