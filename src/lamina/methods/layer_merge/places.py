"""Which parts of chains can be merged, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from lamina.methods.layers import why_stuck
from lamina.network.chains import ELEMENTWISE
from lamina.network.sites import Site, Sites, cut

LONGEST = 4  # layers of one part
TAPS = 11  # along an axis: a larger merged kernel is none that anybody would run
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "pow", "clamp"}
PASSABLE = (ELEMENTWISE - ARITHMETIC) | {"batch_norm"}


def find_places(sites: Sites) -> Iterator[Site]:
    """Yield every part of a chain of convolutions that can become one, then what cannot be linked.

    What cannot has the reason as `rigid`.
    """
    layers = {site.name: site for site in sites.layers}
    refused: list[Site] = []
    for chain in sites.chains:
        open_ = []
        for i in range(len(chain.members) - 1):
            pair = cut(chain, i, i + 1)
            why = why_not_link(pair, layers)
            open_.append(not why)
            if why and any(layers[name].op == "conv" for name in pair.members):
                refused.append(replace(pair, rigid=why))
        for first in range(len(chain.members) - 1):
            for last in range(first + 1, min(first + LONGEST, len(chain.members))):
                if not open_[last - 1]:
                    break
                part = cut(chain, first, last)
                if not why_not_part(part, layers):
                    yield part
    yield from refused


def why_not_link(pair: Site, layers: Mapping[str, Site]) -> str:
    """Return why two neighbours cannot be merged, or `""`."""
    if why := why_not_between(pair):
        return why
    for name in pair.members:
        if why := why_not_layer(layers[name]):
            return why
    return ""


def why_not_part(part: Site, layers: Mapping[str, Site]) -> str:
    """Return why a part of a chain is not for this method, or `""`."""
    sites = [layers[name] for name in part.members]
    if all(s.groups == 1 and set(s.kernel) == {1} and set(s.stride) == {1} for s in sites):
        return "all its kernels are 1x1, which layer_collapse takes"
    for axis in range(len(sites[0].kernel)):
        taps, step = 1, 1
        for site in sites:  # with every kernel held to its middle tap but the smallest
            taps += step * ((site.kernel[axis] - 1) % 2)
            step *= site.stride[axis]
        if taps > TAPS:
            return f"the merged kernel would have {taps} taps"
    return ""


def why_not_between(chain: Site) -> str:
    """Return why what lies between the layers of a chain cannot be taken out, or `""`."""
    return why_stuck(chain, PASSABLE, ": no convolution stands in for it")


def why_not_layer(site: Site) -> str:
    """Return why a layer cannot be merged, or `""`."""
    if site.op != "conv":
        return f"{site.name} is of the operation {site.op}"
    if site.rigid or not site.module:
        return f"{site.name} must stay as it is: {site.rigid or 'it is the whole network'}"
    if site.aliases:
        return f"the weight of {site.name} is tied to {', '.join(site.aliases)}"
    if set(site.dilation) != {1}:
        return f"{site.name} has a dilation of {'x'.join(map(str, site.dilation))}"
    if site.padding_mode != "zeros" or not all(isinstance(p, int) for p in site.padding):
        return f"{site.name} pads with {site.padding_mode} {site.padding}"
    return ""
