"""Blocks that collapse: which there are, and a trained network with them collapsed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from lamina.data import Data
from lamina.errors import MethodError
from lamina.forms import Edit, Plain, install
from lamina.measure.calibrate import calibrate
from lamina.measure.stats import Stats
from lamina.methods.base import Choice, Parts, Passage
from lamina.methods.layer_collapse import fits_of
from lamina.methods.layer_collapse import method as collapse
from lamina.methods.layer_collapse.maps import fit_units, joint_of
from lamina.methods.layer_collapse.merging import map_of, merge
from lamina.methods.layer_collapse.places import activations_of, params, why_not_link
from lamina.network.sites import Site, Sites, cut
from lamina.network.source import Network
from lamina.plan import Edited
from lamina.plan.apply import copy_module, settle
from lamina.plan.spans import parts_of
from lamina.train.slope import Blend, Line

ORDERS = ("last", "loss")


def find_blocks(network: Network, sites: Sites) -> list[Site]:
    """Return the pairs of neighbours that one dense layer makes smaller, in the order of layers.

    Raises:
        MethodError: there is none; says why.
    """
    layers = {site.name: site for site in sites.layers}
    order = {site.name: i for i, site in enumerate(sites.layers)}
    found, reasons = [], []
    for chain in sites.chains:
        for i in range(len(chain.members) - 1):
            pair = cut(chain, i, i + 1)
            a, b = (layers[name] for name in pair.members)
            why = why_not_link(pair, layers)
            if not why and params(a) + params(b) <= a.matrix_shape[2] * b.matrix_shape[1]:
                why = f"one layer would be larger than {pair.name}"
            if why:
                reasons.append(why)
            else:
                found.append(pair)
    if not found:
        why = reasons[0] if reasons else (
            "no layer leads through activations alone to one other (a gated MLP is the product of "
            "two branches, which no slope makes linear)"
        )  # fmt: skip
        raise MethodError("the recipe layer-collapse finds no block", network.name, why)
    return sorted(found, key=lambda pair: order[pair.members[0]])


def order_blocks(
    network: Network, sites: Sites, stats: Stats, blocks: Sequence[Site], order: str
) -> list[Site]:
    """Return blocks in the order in which they collapse.

    Args:
        network, sites, stats: what is collapsed, for predictions.
        blocks: in the order of layers.
        order: `"last"`: from the last (the paper's); `"loss"`: by the predicted loss of collapsing
            each alone without training; what nothing is predicted of comes last.
    """
    if order == "last":
        return list(reversed(blocks))
    errors = {}
    for block in blocks:
        parts = parts_of(network, sites, stats, block)
        known = fits_of(parts)
        errors[block.name] = merge(parts, known[-1]).error if known else math.inf
    return sorted(blocks, key=lambda block: errors[block.name])


def lines_of(
    network: Network, sites: Sites, stats: Stats, blocks: Iterable[Site]
) -> dict[str, Line]:
    """Return what each unit of each block's activation does on average, by path of the activation.

    By least squares from calibration moments. What lies between the layers is taken apart: the line
    is that of the activation alone, without the BatchNorms before and after it.

    Args:
        network, sites, stats: what was measured.
        blocks: pairs of layers; those without moments, or with several activations, are left out.
    """
    found = {}
    for block in blocks:
        parts, paths = parts_of(network, sites, stats, block), activations_of(block)
        cross, seen = parts.cross[0], parts.members[0].stats
        if len(paths) != 1 or cross is None or seen is None:
            continue
        first, joint = map_of(parts.members[0]), joint_of(cross, max(1, seen.samples))
        whole = fit_units(first, joint).map  # z = a h + b for every unit
        own = (first.weight * first.weight).sum(1).clamp_min(1e-300)
        a = (whole.weight * first.weight).sum(1) / own
        b = whole.bias - a * first.bias
        sides = [torch.ones_like(a), torch.zeros_like(a), torch.ones_like(a), torch.zeros_like(a)]
        at = 0  # u = p h + q goes into the activation, z = r v + w comes of what it gives
        for passage in parts.passages[0]:
            if passage.module == paths[0]:
                at = 2
            elif passage.op == "batch_norm":
                scale, shift = (passage.tensors[k].to(a) for k in ("scale", "shift"))
                sides[at], sides[at + 1] = scale * sides[at], scale * sides[at + 1] + shift
        p, q, r, w = sides
        known = (p * r).abs() > 1e-12
        p, r = p.where(known, torch.ones_like(p)), r.where(known, torch.ones_like(r))
        scale = (a / (p * r)).where(known, torch.zeros_like(a))
        shift = ((b - w) / r - scale * q).where(known, torch.zeros_like(a))
        axis = -1 if parts.members[0].site.op == "linear" else 1
        found[paths[0]] = Line(scale, shift, axis)
    return found


def join_blocks(sites: Sites, blocks: Iterable[Site]) -> list[Site]:
    """Return parts of chains that hold these blocks; neighbours that share a layer are one part.

    Example:
        >>> chain = Site("a..c", "chain", members=tuple("abc"), between=((), ()), through=((), ()))
        >>> pairs = [cut(chain, 0, 1), cut(chain, 1, 2)]
        >>> [run.name for run in join_blocks(Sites((), (chain,)), pairs)]
        ['a..c']
    """
    chosen = {block.members for block in blocks}
    runs = []
    for chain in sites.chains:
        links = [chain.members[i : i + 2] in chosen for i in range(len(chain.members) - 1)]
        start = None
        for i, taken in enumerate([*links, False]):
            if taken and start is None:
                start = i
            elif not taken and start is not None:
                runs.append(cut(chain, start, i))
                start = None
    return runs


def saved(sites: Sites, runs: Iterable[Site]) -> float:
    """Return the weights and biases that go when these parts become one layer each."""
    layers = {site.name: site for site in sites.layers}
    gone = 0
    for run in runs:
        members = [layers[name] for name in run.members]
        biases = sum(m.matrix_shape[1] for m in members if m.bias)
        left = members[-1].matrix_shape[1] * (members[0].matrix_shape[2] + 1)
        gone += sum(params(m) for m in members) + biases - left
    return float(gone)


def collapse_runs(
    original: Network,
    module: nn.Module,
    sites: Sites,
    runs: Sequence[Site],
    data: Data | None,
    fit: str = "full",
    samples: int = 1000,
    seed: int = 0,
) -> Edited:
    """Collapse parts of a trained network, and return the edits that make it of the original.

    Parts whose blends are the identity collapse exactly; the others one after the other, each with
    moments of the network as it is by then.

    Args:
        original: whose skeleton the edits are for.
        module: the network, its blends in it or not; unchanged.
        sites: of the original.
        runs: the parts.
        data: with a `calibration` loader, where something bends.
        fit: of parts that bend, see the method.
        samples: of calibration.
        seed: of its sampled labels.

    Raises:
        SiteError: a part cannot be collapsed.
    """
    network = replace(original, module=copy_module(module).eval())
    edits: list[Edit] = []
    layers = {site.name: site for site in sites.layers}
    for run in runs:
        blends = [network.module.get_submodule(path) for path in activations_of(run)]
        straight = all(isinstance(b, Blend) and b.bend == 0 for b in blends)
        stats, wanted = Stats(), "slope"
        if not straight and data is not None and data.calibration is not None:
            part = Sites(tuple(layers[name] for name in run.members), (run,))
            stats = calibrate(
                network, part, data, samples=samples, seed=seed, probe=False
            )  # fmt: skip
        parts = _with_lines(parts_of(network, sites, stats, run), network.module)
        if not straight:
            # No model by the activation's name knows how far its blend has gone.
            guessed = any(isinstance(b, Blend) for b in blends) and None in parts.cross
            known = ("slope",) if guessed else ("slope", *fits_of(parts))
            wanted = fit if fit in known else known[-1]
        settings = {"fit": wanted, "inputs": parts.members[0].site.matrix_shape[2], "bias": 1}
        made = collapse.apply(network, Choice(run, settings), parts)
        install(network.module, made)
        edits += made
    fixed = {edit.path for edit in edits if edit.form == "values"}
    edits += [
        Edit(name, "values", values=Plain(p.detach().clone()))
        for name, p in network.module.named_parameters()
        if name not in fixed
    ]
    return Edited(network, tuple(settle(edits)))


def _with_lines(parts: Parts, module: nn.Module) -> Parts:
    """Return parts in which a blend that has reached its line is that line: scale and shift."""
    passages = []
    for between in parts.passages:
        now = []
        for passage in between:
            blend = module.get_submodule(passage.module)
            if isinstance(blend, Blend) and blend.bend == 0 and blend.scale is not None:
                assert blend.shift is not None
                tensors = {"scale": blend.scale, "shift": blend.shift}
                passage = Passage("batch_norm", passage.module, tensors)
            now.append(passage)
        passages.append(tuple(now))
    return replace(parts, passages=tuple(passages))
