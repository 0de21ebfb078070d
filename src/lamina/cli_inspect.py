"""The verb `inspect`: what can be compressed, how well, and what was refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lamina.cli_run import open_both
from lamina.cli_show import print_table, progress_bar, say

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.artifact import Package
    from lamina.measure.stats import Stats
    from lamina.methods.base import Spanning
    from lamina.network.sites import Site, Sites
    from lamina.network.source import Network
    from lamina.plan import Candidates

SMALL_ERROR = 0.01  # [nats per sample] what is called harmless for one site
WIDEST = 2048  # side of a matrix up to which singular values are looked at
LARGE = 5_000_000  # parameters from which only the quick methods are asked unless told otherwise
QUICK = ("rdoq",)


def inspect(
    model: str, data: str | None, skeleton: str | None, *, samples: int, methods: str | None
) -> None:
    """Open a network and print what can be made of it.

    Args:
        model, data, skeleton: as the user named them.
        samples: of the calibration data.
        methods: names as the user wrote them; None: all, of a large network the quick ones.

    Raises:
        LaminaError: something of it cannot be used.
    """
    from lamina.cli_options import read_budget, read_names
    from lamina.network.discover import discover
    from lamina.network.load import check_network
    from lamina.network.small_folders import small_file
    from lamina.plan.chains import choose_methods
    from lamina.stages import Way, measured, offered

    names = read_names(methods)
    choose_methods(names)
    file = small_file(model)
    if file is not None and data is None and skeleton is None and methods is None:
        from lamina import artifact

        return show_package(model, artifact.read(file))
    network, loaders = open_both(model, data, skeleton)
    check_network(network)
    sites = discover(network)
    if loaders is None:
        return show_sites(network, sites, methods=names)
    said = ""
    if methods is None and (count := sum(p.numel() for p in network.module.parameters())) > LARGE:
        names = list(QUICK)
        said = (
            f"\nOf {count / 1e6:.1f} million parameters only the quick methods were asked: "
            f"{', '.join(QUICK)}. Give --methods all to ask all of them, or their names."
        )
    say(f"{'methods':<9} {', '.join(names) if names else 'all'}")
    with progress_bar() as watch:
        way = Way(
            network, loaders, read_budget("100%"), samples=samples, watch=watch,
            methods=None if names is None else tuple(names),
        )  # fmt: skip
        stats = measured(way, sites)
        candidates = offered(way, sites, stats)
    show_sites(network, sites, stats, candidates, names)
    if said:
        say(said)


def show_sites(
    network: Network,
    sites: Sites,
    stats: Stats | None = None,
    candidates: Candidates | None = None,
    methods: Sequence[str] | None = None,
) -> None:
    """Print what can be compressed and how well, and what was refused and why.

    Args:
        network, sites, stats, candidates: from the stages.
        methods: names of those that are meant; None: all that are asked unless told otherwise.
    """
    from lamina.methods.base import weights_of
    from lamina.plan.chains import choose_methods, choose_spanning
    from lamina.plan.spans import span_refusals

    head = ["site", "op", "methods", "shape", "params", "macs", "zeros", "rank"]
    head += ["bytes", f"at {SMALL_ERROR} nats"] if candidates and stats and stats.samples else []
    asked, over = choose_methods(methods), choose_spanning(methods)
    rows = []
    for site in sites.layers:
        weight = weights_of(network, site)["weight"]
        serve = " ".join(m.name for m in asked if not m.refuse(site))
        row = [site.name, site.op, serve, "x".join(map(str, site.shape)) or "scalar"]
        row += [f"{weight.numel():,}", f"{site.macs:,.0f}", *hints(site, weight)]
        if candidates and stats and stats.samples:
            offers = candidates[site.name]
            harmless = [c.cost.bits / 8 for c in offers if c.error <= SMALL_ERROR]
            row += [f"{weight.numel() * weight.element_size():,}", f"{min(harmless):,.0f}"]
        rows.append(row)
    print_table(head, rows, left=3)
    show_spans(sites, over, stats, candidates)
    families = f"{len(sites.families)} families, " if sites.families else ""
    say(f"\n{network.name}: {len(sites.layers)} layers, {len(sites.chains)} chains, "
        f"{families}{len(sites.rest)} other tensors (kept exactly)")  # fmt: skip
    if not sites.traced:
        say("its data flow could not be traced; layers are found by hooks, chains are not")
    say("rank: directions that hold 90 % of the weight's energy, of all it has")
    for refusal in sites.refusals:
        say(f"refused: {refusal.where}: {refusal.what}: {refusal.why}")
    for name, method, why in dict.fromkeys(span_refusals(sites, over)):
        say(f"refused: {name}: {method}: {why}")


def show_spans(
    sites: Sites, methods: Sequence[Spanning], stats: Stats | None = None,
    candidates: Candidates | None = None,
) -> None:  # fmt: skip
    """Print the chains and families there are, and the parts of them that methods could take."""
    from lamina.plan.alternatives import held
    from lamina.plan.spans import find_spans

    taken = {span.site.name: span for span in find_spans(sites, methods)}
    whole = {site.name: site for site in (*sites.chains, *sites.families)}
    order = {site.name: i for i, site in enumerate(sites.layers)}
    every = whole | {name: span.site for name, span in taken.items()}
    timed = bool(candidates and stats and stats.samples)
    rows = []
    for name, site in sorted(every.items(), key=lambda item: order[item[1].members[0]]):
        takes = " ".join(m.name for m in taken[name].methods) if name in taken else ""
        row = [name, site.kind, takes, held(site).partition(" of ")[2]]
        if timed and candidates:
            harmless = [c.cost.bits / 8 for c in candidates.get(name, ()) if c.error <= SMALL_ERROR]
            row += [f"{min(harmless):,.0f}" if harmless else ""]
        rows.append(row)
    if rows:
        say("")
        head = ["span", "kind", "methods", "holds"] + (["at " + f"{SMALL_ERROR} nats"] * timed)
        print_table(head, rows, left=4)


def hints(site: Site, weight: Tensor) -> tuple[str, str]:
    """Return the share of exact zeros, and how many singular values hold 90 % of the energy.

    Example:
        >>> import torch
        >>> from lamina.network.sites import Site
        >>> hints(Site("fc", shape=(4, 4)), torch.diag(torch.tensor([9.0, 1.0, 0.0, 0.0])))
        ('88%', '1/4')
    """
    import torch

    from lamina.network.sites import as_matrix

    if not weight.numel():
        return "", ""
    zeros = f"{100 * float((weight == 0).double().mean()):.0f}%"
    if weight.dim() < 2 or not weight.is_floating_point():
        return zeros, ""
    matrices = as_matrix(site, weight.detach()).float().cpu()
    if min(matrices.shape[-2:]) > WIDEST:
        return zeros, ""
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.mT
    # Squares of the singular values: a table of embeddings has a hundred rows per column.
    squares = torch.linalg.eigvalsh((matrices.mT @ matrices).double())
    energy = squares.clamp(min=0).flip(-1).cumsum(-1)
    ranks = (energy < 0.9 * energy[:, -1:]).sum(-1) + 1
    return zeros, f"{float(ranks.double().mean()):.0f}/{energy.shape[-1]}"


def show_package(path: str, package: Package) -> None:
    """Print what a `.lamina` file holds and what each part takes, without building its network."""
    rows = []
    for part, size in package.ledger.items():
        record = package.records.get(part)
        row = ["", "", "", f"{size:,}", "", f"{100 * size / package.size:.1f}%"]
        if record is not None:
            row[:3] = ["x".join(map(str, record.shape)) or "scalar", record.form, record.codec]
            row[4] = f"{8 * size / record.elements:.3f}" if record.elements else ""
        rows.append([part, *row])
    weights = sum(record.elements for record in package.records.values())
    bits = f"{8 * package.size / weights:.3f}" if weights else ""
    total = ["total", "", "", "", f"{package.size:,}", bits, "100.0%"]
    head = ["tensor", "shape", "form", "codec", "bytes", "bits/weight", "share"]
    print_table(head, [*rows, total], left=4)
    say(f"\n{path}: skeleton {_short(package.skeleton)}, written by lamina {package.by}")
    if package.box:
        say(f"equal to what it was made of for inputs in {package.box}")
    for edit in package.edits:
        inside = ", ".join(f"{k}={v}" for k, v in edit.settings.items())
        say(f"edit: {edit.path} -> {edit.form}({inside})")
    for site, chain in package.plan.items():
        say(f"plan: {site}: {chain}")


def _short(skeleton: str) -> str:
    """Return what a file says of its skeleton; of a configuration only whose it is.

    Example:
        >>> _short('transformers:{"class":"BertModel","config":{}}'), _short("zoo:lenet-5")
        ('transformers:BertModel', 'zoo:lenet-5')
    """
    import json

    kind, _, told = skeleton.partition(":")
    try:
        return f"{kind}:{json.loads(told)['class']}" if told.startswith("{") else skeleton
    except (ValueError, KeyError, TypeError, RecursionError):
        return skeleton
