"""Compressing a Hugging Face folder layer by layer: at no time is the network there as a whole."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from lamina.data import as_data
from lamina.data import load as load_data
from lamina.errors import BudgetError, InfeasibleError
from lamina.forms import install
from lamina.measure.memory import give_back
from lamina.measure.stats import Stats
from lamina.methods.base import Candidate
from lamina.network.discover import discover
from lamina.network.lazy import Lazy, open_lazily, scan, with_digest
from lamina.network.shards import identity
from lamina.network.sites import Sites
from lamina.opening import load
from lamina.plan import Budget, Candidates, Plan, plan
from lamina.plan.apply import check_fits, check_made_for
from lamina.plan.chains import choose_methods, dump_candidates, parse_candidates
from lamina.report import Report
from lamina.run import RunFolder, key_of, open_run, write_atomic
from lamina.stages import Watch, Way, chains_of, noted
from lamina.streaming.costs import fixed_cost, original_cost
from lamina.streaming.facts import collect
from lamina.streaming.layers import code_layer, code_rest
from lamina.streaming.parts import Part, Written, assemble
from lamina.streaming.sampled import SHORT, offers_of
from lamina.streaming.sequential import NOTE, Survey, coded_in_order, surveyed
from lamina.streaming.surveyed import check_final

METHODS = ("rdoq",)  # and `keep`: what is asked where nobody says otherwise
REFITS = 6
UNSURE = 3e-3  # of a size that was predicted from samples: to code twice costs more than that
VERSION = 1  # of what is kept in a run folder


@dataclass(frozen=True)
class Streamed:
    """What compression of a folder gives, layer by layer.

    Args:
        path: the `.lamina` file.
        plan: the decisions.
        report: what came of them.
        holder: keeps a file without a run folder alive.
    """

    path: Path
    plan: Plan
    report: Report
    holder: Any = field(default=None, repr=False)

    @property
    def model(self) -> nn.Module:
        """The compressed network, opened from its file each time it is asked for."""
        return load(self.path)

    @property
    def file(self) -> bytes:
        """The bytes of the file."""
        return self.path.read_bytes()

    def save(self, path: str | Path) -> None:
        """Write the `.lamina` file, whole or not at all."""
        with self.path.open("rb") as source:
            write_atomic(Path(path), lambda file: shutil.copyfileobj(source, file, 1 << 22))


def compress_folder(
    folder: str | Path, data: Any = None, budget: Any = None, *,
    methods: Sequence[str] | None = None, samples: int = 1000, seed: int = 0,
    decided: Plan | None = None, run: RunFolder | None = None, watch: Watch | None = None,
    notes: Sequence[str] = (),
) -> Streamed:  # fmt: skip
    """Compress a folder to a size, one layer (with data: one block) in memory at a time.

    Args:
        folder: a Hugging Face folder with safetensors.
        data: as `compress`; None: data-free.
        budget: a size; other limits need the whole network.
        methods: names of the methods to choose from; default: `rdoq` and `keep`. Any method of
            single layers may be named, but of layers with over four million weights only these two
            can tell from a sample what they offer.
        samples: of the calibration data.
        seed: of the run.
        decided: a plan to carry out instead of making one.
        run: an open run folder; what was coded before is found there.
        watch: called with (stage, done, total, text).
        notes: for the report.

    Raises:
        BudgetError: a limit other than a size.
        InfeasibleError: nothing fits.
        NetworkError: the folder cannot be streamed.
    """
    limits = _size_only(budget if budget is not None or decided is None else decided.budget)
    asked = choose_methods(methods if methods is not None else METHODS)
    if data is not None:
        check_final(asked)
    with kept_in(run) as (place, holder):
        lazy = open_lazily(folder)
        loaders = as_data(load_data(data, network=lazy.network) if isinstance(data, str) else data)
        way = Way(lazy.network, loaders, limits, samples=samples, folder=place, watch=watch,
                  seed=seed)  # fmt: skip
        way.notes += notes
        lazy = known(lazy, way)
        way.network = lazy.network
        with way.timed("discover"):
            sites = discover(lazy.network, lazy=True)
            if decided is not None:
                check_made_for(decided, lazy.network)
                check_fits(decided, lazy.network, sites)
            kept = code_rest(lazy, rest_of(lazy, sites), place)
        way.costs = original_cost(lazy, sites), fixed_cost(lazy, sites, kept)
        found: Survey | None = None
        if loaders is not None:
            found = surveyed(lazy, sites, asked, way)
            candidates: Candidates = {} if decided is not None else found.candidates
            way.notes.append(NOTE)
        else:
            candidates = {} if decided is not None else offered(lazy, sites, asked, way)
        job = Job(lazy, sites, candidates, kept, way, found)
        limit = limits.resolve({"bytes": way.costs[0].bits / 8}).get("bytes")
        with way.timed("plan"):
            chosen = decided or first_plan(job, limit)
        with way.timed("pack"):
            chosen, parts, written = fitted(job, chosen, limit)
        return finished(job, chosen, parts, written, limit, holder)


@dataclass(frozen=True)
class Job:
    """What is decided about, and with what.

    Args:
        lazy, sites: the network.
        candidates: to choose from; none where a plan was given.
        kept: the coded tensors of no site.
        way: the run.
        survey: of the first pass, where there is data.
    """

    lazy: Lazy
    sites: Sites
    candidates: Candidates
    kept: Sequence[Part]
    way: Way
    survey: Survey | None


@contextlib.contextmanager
def kept_in(run: RunFolder | None) -> Iterator[tuple[RunFolder, Any]]:
    """Yield the run folder, or one that lasts as long as what is made in it."""
    if run is not None:
        yield run, None
        return
    holder = Holder(tempfile.mkdtemp(prefix="lamina-"))
    with open_run(Path(holder.path) / "run") as made:
        yield made, holder


class Holder:
    """A temporary folder that goes when nobody holds this any more."""

    def __init__(self, path: str) -> None:
        self.path = path
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)


def known(lazy: Lazy, way: Way) -> Lazy:
    """Return the network with its digest: every shard is read once, and not again if unchanged."""
    with way.timed("read") as note:
        key = key_of("scan", VERSION, lazy.network.source, identity(lazy.stored))
        tell = way.say("read")
        made = way.stored("digest", key, ".txt", lambda: scan(lazy, tell).encode(), note)
    return with_digest(lazy, made.decode())


def rest_of(lazy: Lazy, sites: Sites) -> list[str]:
    """Return the names of stored tensors that no site claims, in order."""
    claimed = {lazy.key(n) for site in sites.layers for n in (site.weight, site.bias) if n}
    return [name for name in lazy.firsts() if lazy.key(name) not in claimed]


def offered(lazy: Lazy, sites: Sites, methods: Any, way: Way) -> Candidates:
    """Return every layer's candidates, one layer in memory at a time."""
    found: dict[str, tuple[Candidate, ...]] = {}
    late: dict[str, int] = {}
    sampled = 0
    names = [m.name for m in methods]
    with way.timed("propose") as note:
        tell = way.say("propose")
        for i, site in enumerate(sites.layers):
            tell(i, len(sites.layers), site.name)
            give_back()
            key = key_of("offers", VERSION, lazy.network.digest(), site.name, names)
            slow: list[str] = []

            def make(site: Any = site, slow: list[str] = slow) -> bytes:
                offers, skipped = offers_of(lazy, site, methods)
                slow += skipped
                whole = {
                    "late": skipped,
                    "offers": json.loads(dump_candidates({site.name: offers})),
                }
                return json.dumps(whole).encode()

            told = json.loads(way.stored("offers", key, ".json", make, note))
            found |= parse_candidates(json.dumps(told["offers"]).encode())
            sampled += lazy.state[site.weight].numel() > SHORT
            for name in told["late"]:
                late[name] = late.get(name, 0) + 1
        tell(len(sites.layers), len(sites.layers), "")
    if sampled:
        way.notes.append(
            f"Of {sampled} of {len(sites.layers)} layers sizes and errors were predicted from a "
            "sample of their rows and a few steps of Lanczos."
        )
    way.notes += [
        f"{name} was not asked for {count} layers: it would have to look at them as a whole."
        for name, count in late.items()
    ]
    return found


def first_plan(job: Job, limit: float | None) -> Plan:
    """Return the plan for the budget; a little below it where sizes come from samples."""
    exact = all(job.lazy.state[site.weight].numel() <= SHORT for site in job.sites.layers)
    if limit is not None and not exact:
        with contextlib.suppress(InfeasibleError, BudgetError):
            return solved(job, replace(job.way.budget, size=limit * (1 - UNSURE)))
    return solved(job, job.way.budget)


def solved(job: Job, budget: Budget) -> Plan:
    """Return the plan of least error for a budget."""
    way, network = job.way, job.way.network
    assert way.costs is not None
    original, fixed = way.costs
    made = plan(
        network, job.sites, Stats(network=network.digest()), job.candidates, budget,
        original=original, fixed=fixed, objective="sum" if job.survey else "minimax",
    )  # fmt: skip
    return replace(made, budget=way.budget.to_json())


def fitted(
    job: Job, chosen: Plan, limit: float | None
) -> tuple[Plan, list[Part], Written]:  # fmt: skip
    """Code the layers of a plan, and plan again, a little smaller, while the file is too large."""
    way = job.way
    parts, written = coded(job, chosen)
    if not job.candidates or limit is None:
        return chosen, parts, written
    wanted, asked = limit, f"size={way.budget.size}"
    row = noted(way, "size", asked, chosen, {"bytes": written.size})
    for _ in range(REFITS):
        if written.size <= limit:
            break
        wanted -= max(0, written.size - limit + 8)
        try:
            chosen = solved(job, replace(way.budget, size=wanted))
        except (InfeasibleError, BudgetError):
            break
        parts, written = coded(job, chosen)
        row = noted(way, "size", asked, chosen, {"bytes": written.size})
    row["kept"] = written.size <= limit
    return chosen, parts, written


def coded(job: Job, chosen: Plan) -> tuple[list[Part], Written]:
    """Code every layer of a plan that is not coded yet; say what the file would be."""
    lazy, sites, way = job.lazy, job.sites, job.way
    assert way.folder is not None
    skeleton, parts = copy.deepcopy(lazy.network.module), list(job.kept)
    if job.survey is not None:
        parts += coded_in_order(lazy, sites, chosen, job.survey, way, skeleton)
    else:
        tell = way.say("code")
        for i, (name, decision) in enumerate(chosen.sites.items()):
            tell(i, len(chosen.sites), name)
            give_back()
            parts.append(code_layer(lazy, skeleton, sites[name], decision, way.folder))
        tell(len(chosen.sites), len(chosen.sites), "")
    state = skeleton.state_dict(keep_vars=True)
    return parts, assemble(None, lazy, state, parts, chains_of(chosen))


def finished(
    job: Job, chosen: Plan, parts: Sequence[Part], written: Written, limit: float | None,
    holder: Any,
) -> Streamed:  # fmt: skip
    """Write file, plan and report into the run folder."""
    way, lazy = job.way, job.lazy
    assert way.folder is not None
    file = way.folder.path / "net.lamina"
    with way.timed("write"):
        skeleton = copy.deepcopy(lazy.network.module)
        install(skeleton, [edit for part in parts for edit in part.edits])
        state = skeleton.state_dict(keep_vars=True)
        assemble(file, lazy, state, parts, chains_of(chosen))
    with way.timed("report"):
        notes = ["Streamed: one layer was in memory at a time, and the network never as a whole; "
                 "what needs a forward pass was not measured.", *way.notes]  # fmt: skip
        facts = collect(
            lazy, way.data, job.sites, chosen, parts, written, job.candidates, limit=limit,
            seed=way.seed, samples=job.survey.samples if job.survey else 0, rounds=way.rounds,
            notes=notes,
        )  # fmt: skip
    made = Report({**facts, "stages": way.stages})
    chosen.save(way.folder.path / "plan.json")
    made.save(way.folder.path)
    return Streamed(file, chosen, made, holder)


def _size_only(budget: Any) -> Budget:
    """Return the budget.

    Raises:
        BudgetError: there is none, or it limits something that takes the whole network.
    """
    if budget is None:
        raise BudgetError("no budget", "", "something must be met", "give budget='2%', say")
    limits = Budget.parse(budget or "100%")
    for name in limits.to_json():
        if name != "size":
            raise BudgetError(
                f"{name} does not go with streaming", "", "the network is never there as a whole",
                "limit its size alone, or open it as a whole (stream=False)",
            )  # fmt: skip
    return limits
