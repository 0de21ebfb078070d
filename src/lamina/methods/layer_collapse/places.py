"""Which parts of a network collapse, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from lamina.methods.layers import CONV1D, why_stuck
from lamina.network.chains import ELEMENTWISE
from lamina.network.sites import Site, Sites, cut

LONGEST = 6  # layers of one part: a chain of n has n^2 / 2 parts
# Of two values, or of no use as an activation: what a constant does is not known by its name.
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "pow", "clamp"}
DROPOUTS = {op for op in ELEMENTWISE if "dropout" in op}
ACTIVATIONS = ELEMENTWISE - ARITHMETIC - DROPOUTS
LINEAR = {"batch_norm"} | DROPOUTS  # affine for each channel in evaluation mode


def find_places(sites: Sites) -> Iterator[Site]:
    """Yield every part of a chain whose layers become one, from the last to the first.

    Example:
        >>> shapes = {"a": (8, 2), "b": (2, 8), "c": (5, 2)}
        >>> layers = tuple(Site(n, module=n, shape=s) for n, s in shapes.items())
        >>> between, through = (("relu",), ("max_pool1d",)), (("act",), ("pool",))
        >>> chain = Site("a..c", "chain", members=tuple("abc"), between=between, through=through)
        >>> [place.name for place in find_places(Sites(layers, (chain,)))]
        ['a..b']
    """
    layers = {site.name: site for site in sites.layers}
    for chain in sites.chains:
        open_ = [not why_not_link(cut(chain, i, i + 1), layers)
                 for i in range(len(chain.members) - 1)]  # fmt: skip
        for last in range(len(chain.members) - 1, 0, -1):
            for first in range(last - 1, max(-1, last - LONGEST), -1):
                if not open_[first]:
                    break
                yield cut(chain, first, last)


def find_refused(sites: Sites) -> Iterator[Site]:
    """Yield the neighbours that do not collapse, with the reason as `rigid`."""
    layers = {site.name: site for site in sites.layers}
    for chain in sites.chains:
        for i in range(len(chain.members) - 1):
            pair = cut(chain, i, i + 1)
            if why := why_not_link(pair, layers):
                yield replace(pair, rigid=why)


def why_not_link(pair: Site, layers: Mapping[str, Site]) -> str:
    """Return why two neighbours do not become one layer, or `""`."""
    if why := why_not_between(pair):
        return why
    a, b = (layers[name] for name in pair.members)
    for site in (a, b):
        if why := why_not_layer(site):
            return why
    if a.op != b.op:
        return f"{a.name} is a {a.op}, {b.name} a {b.op}"
    if a.op == "linear" and a.positions > 1 and "batch_norm" in pair.between[0]:
        return (
            f"the batch_norm after {a.name} works on its positions, not on its channels, "
            "where a linear layer has several"
        )
    if not least_params(a.matrix_shape[2], b.matrix_shape[1]) < params(a) + params(b):
        return (
            f"it would grow: {a.name} and {b.name} have {params(a) + params(b)} weights, "
            f"a map of rank 1 from {a.matrix_shape[2]} to {b.matrix_shape[1]} has as many"
        )
    return ""


def why_not_between(chain: Site) -> str:
    """Return why what lies between the layers of a chain cannot be taken out, or `""`."""
    lacking = (
        ", not an activation, a BatchNorm or a dropout: no linear map of each position stands in "
        "for it"
    )
    return why_stuck(chain, ACTIVATIONS | LINEAR, lacking)


def why_not_layer(site: Site) -> str:
    """Return why a layer cannot be multiplied with its neighbour, or `""`."""
    if site.op not in ("linear", "conv"):
        return f"{site.name} is of the operation {site.op}"
    if site.rigid and not (site.transposed and site.rigid == CONV1D):  # `resized` does
        return f"{site.name} must stay as it is: {site.rigid}"
    if site.aliases:
        return f"the weight of {site.name} is tied to {', '.join(site.aliases)}"
    if site.groups != 1:
        return f"{site.name} has {site.groups} groups"
    if site.op == "conv":
        if any(k != 1 for k in site.kernel):
            return f"{site.name} has a kernel of {'x'.join(map(str, site.kernel))}, not 1x1"
        if any(s != 1 for s in site.stride):
            return f"{site.name} has a stride"
        if any(p != 0 for p in site.padding):
            return f"{site.name} pads"
        if any(d != 1 for d in site.dilation):
            return f"{site.name} has a dilation"
    return ""


def activations_of(site: Site) -> tuple[str, ...]:
    """Return the modules in a part of a chain that bend what goes through it."""
    return tuple(
        module
        for ops, modules in zip(site.between, site.through, strict=True)
        for op, module in zip(ops, modules, strict=True)
        if op in ACTIVATIONS
    )


def params(site: Site) -> int:
    """Return the weights of a layer, its bias aside."""
    _, rows, columns = site.matrix_shape
    return rows * columns


def least_params(inputs: int, outputs: int) -> int:
    """Return the fewest weights that hold a map: dense, or a pair of rank 1.

    Example:
        >>> least_params(64, 64), least_params(64, 1)
        (128, 64)
    """
    return min(inputs * outputs, inputs + outputs)
