"""One layer at a time: its values are lent to the skeleton, edited, coded, and taken back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from lamina.artifact import records
from lamina.artifact.exact import exact
from lamina.artifact.records import CODEC_IDS, FORMS, read_varint
from lamina.forms import install
from lamina.measure.stats import LayerStats
from lamina.network.lazy import Lazy
from lamina.network.sites import Site
from lamina.plan.apply import carry_out, settle
from lamina.plan.plan import Decision
from lamina.run import RunFolder, key_of
from lamina.streaming.parts import Part, read_part, write_part
from lamina.streaming.rounding import grid_record

Record = tuple[str, bytes, str, str]  # name, record, form, codec
GROUP = 1 << 23  # bytes of kept tensors that are one part


def code_layer(
    lazy: Lazy, skeleton: nn.Module, site: Site, decision: Decision, folder: RunFolder,
    stats: LayerStats | None = None, about: str = "",
) -> Part:  # fmt: skip
    """Carry out a decision on one layer and code what comes of it; done before, only read it.

    Args:
        lazy: the network.
        skeleton: a copy of its module, on `meta`; it gets the structural edits.
        site: the layer.
        decision: for it.
        folder: of the run.
        stats: of the layer; None: data-free.
        about: what else the result depends on (data, what was compressed before).

    Raises:
        SiteError, PlanError: the decision cannot be carried out.
    """
    steps = [[s.method, s.at, dict(s.settings)] for s in decision.steps]
    key = key_of("part", lazy.network.digest(), site.name, steps, about)
    path = folder.stage("part", key, ".bin")
    done = read_part(path)
    if done is not None:
        install(skeleton, done.edits)
        return done
    facts = {"site": site.name}
    if stats is None and _plainly(site, decision):
        step = float(decision.steps[0].settings["step"])
        return write_part(folder, path, _grids(lazy, site, step), facts=facts)
    names = [name for name in (site.weight, site.bias) if name]
    with lent(skeleton, site, {name: lazy.tensor(name) for name in names}):
        network = replace(lazy.network, module=skeleton)
        edits = settle(carry_out(network, site, stats, list(decision.steps), site.name, {}))
        found = [
            _named(e.path, records.encode(e.values))
            for e in edits
            if e.form == "values" and e.values is not None
        ]
    structure = [edit for edit in edits if edit.form != "values"]
    return write_part(folder, path, found, structure, facts)


def _plainly(site: Site, decision: Decision) -> bool:
    """Whether a layer is only rounded, weight by weight, to one grid."""
    if len(decision.steps) != 1 or decision.steps[0].method != "rdoq":
        return False
    settings = decision.steps[0].settings
    groups, out, _ = site.matrix_shape
    biased = not site.bias or groups * out == site.shape[1 if site.transposed else 0]
    return not settings.get("rate") and settings.get("scale", "none") == "none" and biased


def _grids(lazy: Lazy, site: Site, step: float) -> list[Record]:
    return [
        (name, data, "grid", codec)
        for name in (site.weight, site.bias)
        if name
        for data, codec in [grid_record(lazy, name, step)]
    ]


def _named(name: str, data: bytes) -> Record:
    """Return a record with its form and codec, which its first byte tells."""
    _, start = read_varint(memoryview(data), 0)
    form, codec = data[start] & 7, data[start] >> 3 & 7
    known = ("raw", "planes") if form == 0 else CODEC_IDS
    return name, data, FORMS[form], known[codec]


@contextmanager
def lent(module: nn.Module, site: Site, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put values into a skeleton on `meta`; afterwards nothing below the layer holds any."""
    slots = []
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owned = module.get_submodule(path)._parameters
        slots.append((owned, leaf, owned[leaf]))
        owned[leaf] = nn.Parameter(tensor, requires_grad=False)
    try:
        yield
    finally:
        for owned, leaf, old in slots:
            owned[leaf] = old
        for part in module.get_submodule(site.module).modules():
            for leaf, held in part._parameters.items():
                if held is not None and not held.is_meta:
                    part._parameters[leaf] = nn.Parameter(held.to("meta"), requires_grad=False)


def code_rest(lazy: Lazy, names: Sequence[str], folder: RunFolder) -> list[Part]:
    """Code tensors that are kept as they are, a few at a time.

    Args:
        names: of tensors no site claims.
    """
    groups: list[list[str]] = []
    room = 0
    for name in names:
        size = lazy.state[name].numel() * lazy.state[name].element_size()
        if size > room or not groups:
            groups.append([])
            room = GROUP
        groups[-1].append(name)
        room -= size
    found = []
    for group in groups:
        path = folder.stage("kept", key_of("kept", lazy.network.digest(), group), ".bin")
        part = read_part(path)
        if part is None:
            coded = [_named(name, records.encode(exact(lazy.tensor(name)))) for name in group]
            part = write_part(folder, path, coded)
        found.append(part)
    return found
