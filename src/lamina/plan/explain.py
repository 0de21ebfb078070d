"""Explaining: why a plan takes what it takes for a layer, beside all it could have taken."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.errors import PlanError, SiteError
from lamina.measure.stats import LayerStats, Stats
from lamina.methods.base import Candidate, Method, weights_of
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan.allocate import hull
from lamina.plan.alternatives import apart, held, span_offers, spans_over, unheard
from lamina.plan.chains import Candidates, choose_methods, choose_spanning
from lamina.plan.curves import (
    Point,
    chain_of,
    curves,
    key_of,
    method_offers,
    point_of,
    priced,
    prices,
    sparse,
    taken_point,
    timed_alike,
)
from lamina.plan.plan import Plan

SHOWN = 6  # points of a chain's curve in the text
NAMED = 3  # other chains that the reason names
SAME = 1 + 1e-9  # two sums of the same numbers in another order are the same
UNITS = {"bytes": "byte", "macs": "MAC", "params": "parameter", "seconds": "second"}


@dataclass(frozen=True)
class Explanation:
    """Why one layer undergoes what it does.

    Args:
        site: the layer's name.
        shape: what it is, as text.
        taken: the point taken.
        points: of all curves, chain by chain, each from its smallest point up.
        price: by resource, the error that one more unit of it would save in the whole network.
        cheaper, dearer: the neighbours of the point on the hull of what was offered, or None.
        why: one or two sentences.
        refusals: (method, why) of methods that offer nothing here.
        objective: of the plan, `"sum"` or `"minimax"`.
        spans: (name, why not) of spans that would take the layer.
    """

    site: str
    shape: str
    taken: Point
    points: tuple[Point, ...]
    price: Mapping[str, float]
    cheaper: Point | None
    dearer: Point | None
    why: str
    refusals: tuple[tuple[str, str], ...] = ()
    objective: str = "sum"
    spans: tuple[tuple[str, str], ...] = ()

    def dict(self) -> dict[str, Any]:
        """Return the explanation as JSON values."""
        return {
            "site": self.site,
            "shape": self.shape,
            "taken": self.taken.dict(),
            "points": [p.dict() for p in self.points],
            "price": dict(self.price),
            "cheaper": self.cheaper and self.cheaper.dict(),
            "dearer": self.dearer and self.dearer.dict(),
            "why": self.why,
            "refusals": [list(r) for r in self.refusals],
            "objective": self.objective,
            "spans": [list(s) for s in self.spans],
        }

    def text(self) -> str:
        """Return the explanation as plain text: the reason, the neighbours, and every curve."""
        lines = [f"{self.site}: {self.shape}", f"takes {self.taken.steps}", "", self.why]
        if any(self.price.values()):
            said = ", ".join(f"{p:.3g} {self.unit} per {UNITS[r]}" for r, p in self.price.items())
            lines.append(f"Price at this budget: {said}.")
        near = [("next cheaper", self.cheaper), ("taken", self.taken), ("next dearer", self.dearer)]
        rows = [[word, *cells(p), p.steps] for word, p in near if p is not None]
        lines += ["", *table(["", *HEAD, "chain"], rows)]
        order = ranked(self.taken, self.points, self.price)
        rows = [[chain, f"{len(line)}", "never" if ratio is None else f"{ratio:.2f}x"]
                for ratio, chain, line in order]  # fmt: skip
        head = ["chain", "points", f"{measure(self.price)} for the same error"]
        lines += ["", *table(head, rows, left=frozenset({0}))]
        lines += ["", "Their curves; * is taken, - is beaten by another point in everything"]
        rows = []
        for _, chain, line in order:
            rows.append(["", *[""] * len(HEAD), chain])
            for p in sparse(line, SHOWN):
                mark = "*" if p.taken else "" if p.offered else "-"
                rows.append([mark, *cells(p), f"  {p.steps}"])
        lines += table(["", *HEAD, "chain"], rows)
        if self.spans:
            lines += ["", "In a span instead:", *(f"  {name}: {why}" for name, why in self.spans)]
        if self.refusals:
            lines += ["", "Not offered:", *(f"  {name}: {why}" for name, why in self.refusals)]
        return "\n".join(line.rstrip() for line in lines)

    @property
    def unit(self) -> str:
        return "nats" if self.objective == "sum" else "relative error"


HEAD = ("bytes", "params", "MACs", "ms", "error")


def explain(
    network: Network,
    sites: Sites,
    stats: Stats,
    candidates: Candidates,
    plan: Plan,
    layer: str,
    methods: Sequence[str] | None = None,
) -> Explanation:
    """Say why a plan takes what it takes for one layer.

    Every method is asked once more, so that also the curves are there which another one beats.

    Args:
        network, sites, stats, candidates: what the plan was made from.
        plan: the decision.
        layer: name of a layer, or of a span; what is said of a layer in a span is said of that.
        methods: names of the methods that were asked; default: all.

    Raises:
        SiteError: there is no such layer; names the nearest.
        PlanError: the plan says nothing of it.

    Example:
        >>> import torch
        >>> from lamina.network.discover import discover
        >>> from lamina.plan import Budget, propose
        >>> from lamina.plan.decide import plan as decide
        >>> net = Network(torch.nn.Sequential(torch.nn.Linear(16, 8)), (torch.zeros(1, 16),))
        >>> sites = discover(net)
        >>> offers = propose(net, sites, Stats())
        >>> made = decide(net, sites, Stats(), offers, Budget(size="70%"))
        >>> print(explain(net, sites, Stats(), offers, made, "0").taken.chain)
        rdoq
    """
    asked = choose_methods(methods)
    name = decided_at(sites, plan, layer)
    site, decision, offers = sites[name], plan.sites[name], candidates.get(name, ())
    alone = site.kind == "layer"
    known = stats.of(name) if alone else None
    if alone:
        again = method_offers(site, weights_of(network, site), known, asked)
    else:
        spanning = choose_spanning(methods)
        again = span_offers(network, sites, stats, site, spanning, asked)
    here = {key_of(c.steps) for c in offers}
    again = [c for c in timed_alike(again, offers) if key_of(c.steps) not in here]
    beaten = [point_of(c, decision, offered=False) for c in again]
    points = [*(point_of(c, decision) for c in offers), *beaten]
    if not alone:
        points += apart(candidates, site, plan.objective)
    if not any(p.taken for p in points):  # a plan that was edited, or of a recipe
        points.append(taken_point(decision))
    points.sort(key=lambda p: (p.chain, p.cost.bits, p.error))
    taken = next(p for p in points if p.taken)
    price = prices(candidates, plan)
    cheaper, dearer = neighbours(offers, taken, price)
    why = reason(taken, points, price, plan)
    return Explanation(
        site=name,
        shape=f"{site.op} {' x '.join(map(str, site.shape))}".strip() if alone else held(site),
        taken=taken,
        points=tuple(points),
        price=price,
        cheaper=cheaper,
        dearer=dearer,
        why=why if name == layer else f"{layer} is in {name}. {why}",
        refusals=(
            silent(site, asked, points, known) if alone else unheard(site, spanning, points, sites)
        ),
        objective=plan.objective,
        spans=spans_over(candidates, sites, plan, name, price) if alone else (),
    )


def summarise(candidates: Candidates, plan: Plan, sites: Sites | None = None) -> str:
    """Return every layer's choice in a line, beside the best other chain, as a plain text table.

    Args:
        candidates: of every site of the plan; nothing is asked again, so that a method that is
            beaten everywhere does not appear.
        plan: the decision.
        sites: of the network; with them the layers of a span have lines that say so.
    """
    price = prices(candidates, plan)
    rows = []
    for name, decision in plan.sites.items():
        points = curves(candidates.get(name, ()), decision)
        taken = next(p for p in points if p.taken)
        row = [name, taken.chain, f"{taken.bytes:,.0f}", f"{taken.error:.3g}"]
        rows.append([*row, rival(taken, points, price)])
        members = sites[name].members if sites is not None and name in sites else ()
        rows += [[f"  {member}", f"in {name}", "", "", ""] for member in members]
    head = ["layer", "takes", "bytes", "error", "for the same error"]
    lines = table(head, rows, left=frozenset({0, 1, 4}))
    if any(price.values()):
        said = ", ".join(f"{p:.3g} per {UNITS[r]}" for r, p in price.items())
        lines.append(f"price at this budget, nats: {said}")
    return "\n".join(line.rstrip() for line in lines)


def decided_at(sites: Sites, plan: Plan, name: str) -> str:
    """Return under which name a plan decides about a layer: its own, or that of its span.

    Raises:
        SiteError: there is no such layer.
        PlanError: the plan says nothing of it.
    """
    site = layer_of(sites, name)
    if name in plan.sites:
        return name
    for other in plan.sites:
        if other in sites and name in sites[other].members:
            return other
    if site.kind != "layer":
        raise PlanError("the plan does not take this span", name, "its layers are decided alone")
    raise PlanError("the plan says nothing of this layer", name)


def rival(taken: Point, points: Sequence[Point], price: Mapping[str, float]) -> str:
    """Return the best other chain in words."""
    others = [(r, c) for r, c, _ in ranked(taken, points, price) if c != taken.chain]
    if not others:
        return "no other chain is offered"
    ratio, chain = others[0]
    if ratio is None:
        return "no other chain reaches it"
    return f"{chain} takes {ratio:.2f}x the {measure(price)}"


def reason(taken: Point, points: Sequence[Point], price: Mapping[str, float], plan: Plan) -> str:
    """Return why a point was taken, in words: the rule, and what the other chains would cost."""
    others = [(r, c) for r, c, _ in ranked(taken, points, price) if c != taken.chain]
    named = [f"{chain} {ratio:.2f}x" for ratio, chain in others if ratio is not None]
    said = rule(taken, points, price, plan)
    if named:
        some = ", ".join(named[:NAMED]) + (", others more" if len(named) > NAMED else "")
        return f"{said} For the same error other chains take, in {measure(price)}: {some}."
    return f"{said} No other chain reaches this error." if others else said


def rule(taken: Point, points: Sequence[Point], price: Mapping[str, float], plan: Plan) -> str:
    """Return the rule by which a point was taken, as a sentence."""
    if plan.objective != "sum":
        return (
            f"The largest relative error in the plan is {plan.error:.3g}: this is the cheapest "
            "point that stays below it, or what was left over paid for a better one."
        )
    if not any(price.values()):
        return "Nothing the budget limits is scarce, so it is a point of least error."
    worth = [p.error + priced(p.cost, price) for p in points if p.offered]
    here, best = taken.error + priced(taken.cost, price), min(worth, default=0.0)
    scarce = " and ".join(f"{v:.3g} nats/{UNITS[r]}" for r, v in price.items() if v)
    if here <= best * SAME:
        return f"At the network's price of {scarce} it has the least error and price together."
    said = (
        f"At the network's price of {scarce} another point would be {here - best:.2g} nats better"
    )
    if {chain_of(d.steps) for d in plan.sites.values()} == {"rdoq"}:
        return f"{said}; all layers take grids, from which training can squeeze the file."
    return f"{said}; single points rarely fill a budget, and this one uses what the others left."


def ranked(
    taken: Point, points: Sequence[Point], price: Mapping[str, float]
) -> list[tuple[float | None, str, list[Point]]]:
    """Return the chains, the taken one first and then by what they cost at no more error.

    Returns:
        (how many times the taken point's cost, or None if never; chain; its points).
    """
    lines: dict[str, list[Point]] = {}
    for p in points:
        lines.setdefault(p.chain, []).append(p)
    here = max(priced(taken.cost, price), 1e-300)
    found: list[tuple[float | None, str, list[Point]]] = []
    for chain, line in lines.items():
        able = [priced(p.cost, price) for p in line if reaches(p, taken, price)]
        found.append((min(able) / here if able else None, chain, line))
    return sorted(
        found, key=lambda f: (f[1] != taken.chain, f[0] is None, f[0] or 0.0, len(f[1]), f[1])
    )


def reaches(point: Point, taken: Point, price: Mapping[str, float]) -> bool:
    """Whether a point has no more error; where time has a price, one that was not timed has not."""
    untimed = price.get("seconds") and taken.cost.seconds and not point.cost.seconds
    return not untimed and point.error <= taken.error * SAME


def measure(price: Mapping[str, float]) -> str:
    """Return what `priced` counts, in words."""
    scarce = [r for r, p in price.items() if p] or ["bytes"]
    words = ["MACs" if r == "macs" else r for r in scarce]
    return words[0] if len(words) == 1 else f"{' and '.join(words)} at their prices"


def neighbours(
    offers: Sequence[Candidate], taken: Point, price: Mapping[str, float]
) -> tuple[Point | None, Point | None]:
    """Return the next cheaper and the next dearer point on the lower hull of a layer's offers."""
    if not offers:
        return None, None
    paid = [priced(c.cost, price) for c in offers]
    order = [offers[i] for i in hull([c.error for c in offers], paid)]
    here = priced(taken.cost, price)
    below = [c for c in order if priced(c.cost, price) * SAME < here]
    above = [c for c in order if priced(c.cost, price) > here * SAME]
    return (point_of(below[-1]) if below else None), (point_of(above[0]) if above else None)


def silent(
    site: Site, methods: Sequence[Method], points: Sequence[Point], stats: LayerStats | None
) -> tuple[tuple[str, str], ...]:
    """Return which methods offer nothing for a layer, and why."""
    heard = {name for p in points for name in p.chain.replace(" | ", " > ").split(" > ")}
    found = []
    for method in methods:
        if why := method.refuse(site):
            found.append((method.name, why))
        elif site.kind not in method.kinds:
            found.append((method.name, f"it serves {' and '.join(method.kinds)} sites only"))
        elif method.name not in heard:
            blind = method.needs and stats is None
            found.append((method.name, "it needs data" if blind else "it has no offer for it"))
    return tuple(found)


def layer_of(sites: Sites, name: str) -> Site:
    """Return a layer, or a span of them, by name.

    Raises:
        SiteError: there is none; names the nearest, and the first forty there are.
    """
    names = [site.name for site in sites.layers]
    if name in names or (name and name in sites):
        return sites[name]
    near = [n for n in names if name.startswith(f"{n}.")]  # a tensor of a layer
    near += difflib.get_close_matches(name, names, 1, 0.4)
    some = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    fix = f"did you mean {near[0]!r}?" if near else "give one of them, or all"
    raise SiteError("no such layer", repr(name), f"the layers are {some}", fix)


def cells(point: Point) -> list[str]:
    """Return a point's numbers as text, in the order of `HEAD`."""
    cost = point.cost
    took = f"{1e3 * cost.seconds:.3g}" if cost.seconds else ""
    return [f"{point.bytes:,.0f}", f"{cost.params:,.0f}", f"{cost.macs:,.0f}", took,
            f"{point.error:.3g}"]  # fmt: skip


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], left: frozenset[int] | None = None
) -> list[str]:
    """Return aligned lines; the columns `left` (default: the first and the last) hold text.

    Columns without any text are left out.
    """
    left = frozenset({0, len(head) - 1}) if left is None else left
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    widths = {i: max(len(row[i]) for row in (head, *rows)) for i in used}
    return [
        "  ".join(f"{row[i]:<{widths[i]}}" if i in left else f"{row[i]:>{widths[i]}}" for i in used)
        for row in (head, *rows)
    ]
