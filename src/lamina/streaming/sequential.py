"""Calibrating block by block, in the order they run: GPTQ's way, in the memory of one block.

First the network runs as it is, block by block over all samples: every layer's moments are measured
while its block is there, and it says what it offers. One plan chooses for all layers at one price.
Then the network runs again: each layer is quantized with the input moments that the compressed
blocks before it give, and the compressed block makes the next one's inputs.

Reference: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lamina.artifact import records, streams
from lamina.errors import DataError
from lamina.measure.forward import Batch, at_rest, batches
from lamina.measure.memory import give_back
from lamina.measure.stats import LayerStats, Stats
from lamina.measure.store import load_stats, save_stats
from lamina.methods.base import Candidate, Method
from lamina.network.lazy import Lazy
from lamina.network.sites import Site, Sites
from lamina.plan import Plan
from lamina.plan.chains import dump_candidates, parse_candidates
from lamina.run import key_of
from lamina.stages import Way, data_key
from lamina.streaming.blocks import Passing, Stack, enter, find_blocks, leave, run_block, whole
from lamina.streaming.layers import code_layer
from lamina.streaming.parts import Part
from lamina.streaming.surveyed import survey_layer
from lamina.streaming.watching import Watch, blind_stats

NOTE = (
    "Calibrated block by block: inputs as the compressed blocks before give them, output gradients "
    "of each block's own change, token by token, relative to its size; predicted errors are sums "
    "of these, not nats."
)


@dataclass(frozen=True)
class Survey:
    """What the first pass, over the network as it is, found.

    Args:
        candidates: of every layer.
        early: statistics of layers that run before the blocks, whole.
        gradients: `G` of every other layer.
        samples: that were seen.
    """

    candidates: Mapping[str, tuple[Candidate, ...]]
    early: Mapping[str, LayerStats]
    gradients: Mapping[str, Tensor]
    samples: int


@dataclass
class Running:
    """A network, its blocks and its batches; where a tensor was coded, its values are those."""

    lazy: Lazy
    sites: Sites
    stack: Stack
    batches: list[Batch]
    seed: int
    coded: dict[object, tuple[Part, str]]

    @classmethod
    def of(cls, lazy: Lazy, sites: Sites, way: Way) -> Running:
        """Return a network with its calibration batches.

        Raises:
            DataError: there are none.
            NetworkError: it has no list of blocks.
        """
        loader = way.data.calibration if way.data else None
        if loader is None:
            raise DataError("no calibration data", "data", "", "give an iterable of batches")
        floats = {t.dtype for t in lazy.state.values() if t.is_floating_point()}
        dtype = floats.pop() if len(floats) == 1 else torch.float32
        stand_in = nn.Linear(1, 1, dtype=dtype)  # on the CPU, for the module itself is on meta
        found = list(batches(stand_in, loader, way.samples))
        return cls(lazy, sites, find_blocks(lazy.network.module), found, way.seed, {})

    @property
    def root(self) -> nn.Module:
        return self.lazy.network.module

    @property
    def samples(self) -> int:
        return sum(batch.size for batch in self.batches)

    def inside(self, i: int) -> list[Site]:
        """Return the layers of a block."""
        prefix = self.stack.prefix(i)
        return [s for s in self.sites.layers if s.module.startswith(f"{prefix}.")]

    def outside(self) -> list[Site]:
        """Return the layers of no block."""
        prefix = f"{self.stack.path}."
        return [s for s in self.sites.layers if not s.module.startswith(prefix)]

    def watch(self, sites: Sequence[Site], gradients: bool) -> Watch:
        """Return a watch over layers."""
        return Watch(self.root, sites, self.samples, self.seed, gradients)

    def values(self, name: str) -> Tensor:
        """Return a tensor's values: as compressed, where it is."""
        found = self.coded.get(self.lazy.key(name))
        if found is None:
            return self.lazy.tensor(name)
        part, stored = found
        record = next(c for c in part.tensors if c.name == stored)
        with part.path.open("rb") as file:
            file.seek(record.start)
            data = memoryview(file.read(record.length))
        _, start = records.read_varint(data, 0)
        like = self.lazy.state[name]
        parsed = records.parse(data[start:], tuple(like.shape), like.dtype, name)
        return streams.dense(parsed, streams.thread_count())

    def put(self, part: Part) -> Part:
        """Let the values of a part stand for the network's own."""
        for record in part.tensors:
            self.coded[self.lazy.key(record.name)] = (part, record.name)
        return part


def key_of_data(lazy: Lazy, way: Way) -> str:
    """Return a key of everything that statistics depend on."""
    return key_of(lazy.network.digest(), data_key(way.data), way.samples, way.seed)


def surveyed(lazy: Lazy, sites: Sites, methods: Sequence[Method], way: Way) -> Survey:
    """Return what layers offer, from the run folder where it is there."""
    key = key_of("survey", key_of_data(lazy, way), [m.name for m in methods])
    assert way.folder is not None
    offers = way.folder.stage("survey", key, ".json")
    tensors = way.folder.stage("survey", key, ".safetensors")
    known = way.folder.read(offers)
    if known is None or not tensors.exists():
        found = survey(lazy, sites, methods, way)
        layers = dict(found.early)
        for name, G in found.gradients.items():
            layers[name] = LayerStats(torch.zeros(1, 1, dtype=torch.float64), G)
        way.folder.write(tensors, partial(save_stats, Stats(layers, found.samples)))
        way.folder.write(offers, dump_candidates(found.candidates))
        return found
    stats = load_stats(tensors)
    early = {n: s for n, s in stats.layers.items() if s.samples}
    rest = {n: s.G for n, s in stats.layers.items() if not s.samples}
    return Survey(parse_candidates(known), early, rest, stats.samples)


def survey(lazy: Lazy, sites: Sites, methods: Sequence[Method], way: Way) -> Survey:
    """Run the network as it is, block by block, and return what its layers offer."""
    run = Running.of(lazy, sites, way)
    about = key_of_data(lazy, way)
    names = [m.name for m in methods]
    candidates: dict[str, tuple[Candidate, ...]] = {}

    def offer(site: Site, stats: LayerStats | None) -> None:
        stats = stats or blind_stats(site, lazy.tensor(site.weight))

        def make() -> bytes:
            return dump_candidates({site.name: survey_layer(lazy, site, stats, methods)})

        key = key_of("surveyed", about, site.name, names)
        candidates.update(parse_candidates(way.stored("surveyed", key, ".json", make, {})))

    with way.timed("measure"), at_rest(run.root, seed=run.seed):
        tell, count = way.say("measure"), len(run.stack.blocks)
        outer = run.watch(run.outside(), gradients=True)
        passings = enter(
            run.root, run.stack, run.batches, run.values, lambda b: outer.looking(b.mask, b.size)
        )
        early = {s.name for s in outer.sites if outer.inputs[s.name].count or s.aliases}
        gradients: dict[str, Tensor] = {}
        tupled = False
        for i, block in enumerate(run.stack.blocks):
            tell(i, count, run.stack.prefix(i))
            give_back()
            watch = run.watch(run.inside(i), gradients=True)
            with whole(block, run.stack.prefix(i), run.values):
                for j, passing in enumerate(passings):
                    with watch.looking(passing.mask, passing.size), torch.enable_grad():
                        output, tupled = run_block(block, passing)
                        watch.send_back(output)
                    passings[j] = passing.with_hidden(output.detach())
            for site in watch.sites:
                stats = watch.stats_of(site)
                if stats is not None:
                    gradients[site.name] = stats.G
                offer(site, stats)
        ends = [passing.hidden for passing in passings]
        leave(
            run.root, run.stack, run.batches, ends, tupled, run.values,
            lambda b: outer.looking(b.mask, b.size, again=True),
        )  # fmt: skip
        whole_stats: dict[str, LayerStats] = {}
        for site in outer.sites:
            stats = outer.stats_of(site)
            offer(site, stats)
            if stats is not None and site.name in early:
                whole_stats[site.name] = stats
            elif stats is not None:
                gradients[site.name] = stats.G
        tell(count, count, "")
    ordered = {site.name: candidates[site.name] for site in sites.layers}
    return Survey(ordered, whole_stats, gradients, run.samples)


def coded_in_order(
    lazy: Lazy, sites: Sites, chosen: Plan, found: Survey, way: Way, skeleton: nn.Module
) -> list[Part]:
    """Run the network again and code every layer with what the compressed ones before it give."""
    assert way.folder is not None
    folder = way.folder
    run = Running.of(lazy, sites, way)
    # A layer's code depends on what was decided for those before it: on the whole plan, to be safe.
    steps = {n: [[s.method, dict(s.settings)] for s in d.steps] for n, d in chosen.sites.items()}
    about = key_of(key_of_data(lazy, way), steps)
    parts: list[Part] = []
    tell, count = way.say("code"), len(run.stack.blocks)

    def code(site: Site, stats: LayerStats | None) -> None:
        stats = stats or blind_stats(site, lazy.tensor(site.weight))
        decision = chosen.sites[site.name]
        part = code_layer(lazy, skeleton, site, decision, folder, stats, about)
        parts.append(run.put(part))

    with at_rest(run.root, seed=run.seed), torch.no_grad():
        late = []
        for site in run.outside():
            if site.name in found.early:
                code(site, found.early[site.name])
            else:
                late.append(site)
        passings = enter(run.root, run.stack, run.batches, run.values)
        tupled = False
        for i, block in enumerate(run.stack.blocks):
            tell(i, count, run.stack.prefix(i))
            give_back()
            watch = _inputs_of(run, i, block, passings)
            for site in watch.sites:
                code(site, watch.stats_of(site, found.gradients.get(site.name)))
            with whole(block, run.stack.prefix(i), run.values):
                for j, passing in enumerate(passings):
                    output, tupled = run_block(block, passing)
                    passings[j] = passing.with_hidden(output)
        outer = run.watch(late, gradients=False)
        if late:
            ends = [passing.hidden for passing in passings]
            leave(
                run.root, run.stack, run.batches, ends, tupled, run.values,
                lambda b: outer.looking(b.mask, b.size),
            )  # fmt: skip
        for site in late:
            code(site, outer.stats_of(site, found.gradients.get(site.name)))
        tell(count, count, "")
    return parts


def _inputs_of(run: Running, i: int, block: nn.Module, passings: Sequence[Passing]) -> Watch:
    """Measure the input moments of a block's layers, the blocks before it compressed."""
    watch = run.watch(run.inside(i), gradients=False)
    with whole(block, run.stack.prefix(i), run.values):
        for passing in passings:
            with watch.looking(passing.mask, passing.size):
                run_block(block, passing)
    return watch
