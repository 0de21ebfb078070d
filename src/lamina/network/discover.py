"""Discovery: the layers and chains of a network, what was given up and why, and what is left."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from lamina.network.chains import find_chains, own_passages
from lamina.network.families import find_families
from lamina.network.layers import describe
from lamina.network.observe import Uses, observe
from lamina.network.sites import Refusal, Site, Sites
from lamina.network.source import Network
from lamina.network.tensors import Tensors, join, named_tensors, unfit
from lamina.network.trace import Flow, Op, trace

ORIGINALS = ("_g", "_v", "_orig")  # what weight_norm, spectral_norm and pruning leave behind


def discover(network: Network, *, lazy: bool = False) -> Sites:
    """Find every place of a network that can be compressed; the network is not changed.

    Layers are read from the module tree and one forward pass with hooks, chains from
    `torch.export`. Where one of them fails, the other is enough to go on, and a refusal says
    what was given up.

    Args:
        network: with example inputs; without them there are no chains, and positions are 1.
        lazy: its parameters are on `meta`, for their values are elsewhere: nothing is exported,
            and where a forward pass without values fails, positions are 1.

    Returns:
        Sites in module order: `layers`, `chains`, `families`, `refusals`, and as `rest` the names
        of all parameters and persistent buffers that no site claims, in `state_dict` order.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> sites = discover(Network(mlp, (torch.zeros(1, 3),)))
        >>> [site.name for site in sites.layers], sites.chains[0].between
        (['0', '2'], (('relu',),))
    """
    tensors = named_tensors(network.module)
    drafts, refusals, explained = _drafts(network.module, tensors, lazy)
    uses = _observe_on_meta(network, drafts) if lazy else observe(network, drafts)
    flow = trace(network) if not lazy else "the network is streamed: it is never there as a whole"
    readers = flow.readers(tensors.first) if isinstance(flow, Flow) else {}
    layers = []
    for same in _by_tensor(drafts, tensors):
        site = _settle(network.module, same, tensors, lazy)
        if isinstance(uses, Uses):
            site, note = _place(site, same, uses)
            refusals += note
        if not site.rigid:
            site = replace(site, rigid=_read_elsewhere(site, readers, tensors))
        layers.append(site)
    chains: tuple[Site, ...] = ()
    if isinstance(flow, Flow):
        chains, broken = find_chains(tuple(layers), flow, tensors)
        chains = own_passages(network.module, chains, flow)
        refusals += broken
    else:
        refusals.append(Refusal("chains", "chain sites", flow))
    if isinstance(uses, str) and uses != flow:
        refusals.append(Refusal("positions", "positions, taken as 1 per sample", uses))
    claimed = {tensors.first[name] for site in layers for name in (site.weight, site.bias) if name}
    rest = tuple(
        name
        for name, tensor in tensors.by_name.items()
        if tensors.first[name] == name and name not in claimed and not is_lazy(tensor)
    )
    refusals += _unknown(network.module, rest, tensors, explained)
    refusals += _extra_state(network.module)
    families = find_families(layers)
    return Sites(tuple(layers), chains, tuple(refusals), rest, isinstance(flow, Flow), families)


class _Yes(TorchDispatchMode):
    """Answers whatever is asked about values that are not there ("is nothing masked?") with 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


def _observe_on_meta(network: Network, drafts: Iterable[Site]) -> Uses | str:
    """Observe a copy with buffers and inputs on `meta` too: its forward pass costs nothing."""
    copied = replace(
        network,
        module=copy.deepcopy(network.module).to("meta"),
        example_inputs=tuple(_moved(value) for value in network.example_inputs),
        example_kwargs={name: _moved(v) for name, v in network.example_kwargs.items()},
    )
    with _Yes():
        return observe(copied, drafts)


def _moved(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _drafts(
    root: nn.Module, tensors: Tensors, lazy: bool
) -> tuple[list[Site], list[Refusal], set[str]]:
    """Return a site for every weight that can be one, refusals, and the tensors these explain."""
    drafts: list[Site] = []
    refusals: list[Refusal] = []
    explained: set[str] = set()
    for path, module in root.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, how, originals in _computed(path, module):
            why = f"its values are computed ({how}), not stored; the originals are coded losslessly"
            refusals.append(Refusal(name, "layer", why))
            explained.update(originals)
        parent = root.get_submodule(path.rpartition(".")[0]) if path else None
        for site in describe(path, module, parent):
            weight = tensors.by_name[site.weight]
            reason = unfit(weight, lazy)
            if not reason and site.weight in tensors.overlaps:
                reason = f"it shares part of its memory with {tensors.overlaps[site.weight]}"
            if reason:
                refusals.append(
                    Refusal(site.name, "layer", f"its weight is kept as it is: {reason}")
                )
                explained.add(tensors.first[site.weight])
            elif weight.numel() > 0:
                drafts.append(site)
    return drafts, refusals, explained


def _computed(path: str, module: nn.Module) -> Iterator[tuple[str, str, list[str]]]:
    """Yield what a module computes from other weights: name, how, names of the originals."""
    parametrizations = module._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict):
        for leaf, steps in parametrizations.items():
            prefix = join(path, f"parametrizations.{leaf}")
            names = [join(prefix, name) for name, _ in steps.named_parameters()]
            if any(p.dim() > 1 for p in steps.parameters()):
                how = ", ".join(type(step).__name__.strip("_") for step in steps.children())
                yield join(path, leaf), how, names
    found: dict[str, list[str]] = {}
    for leaf, parameter in module._parameters.items():
        base = next((leaf.removesuffix(s) for s in ORIGINALS if leaf.endswith(s)), "")
        if base and parameter is not None and isinstance(module.__dict__.get(base), torch.Tensor):
            found.setdefault(base, []).append(leaf)
    for base, leaves in found.items():
        if any(module._parameters[leaf].dim() > 1 for leaf in leaves):  # type: ignore[union-attr]
            how = " and ".join(leaves)
            yield join(path, base), f"from {how}", [join(path, leaf) for leaf in leaves]


def _by_tensor(drafts: Iterable[Site], tensors: Tensors) -> list[list[Site]]:
    groups: dict[str, list[Site]] = {}
    for site in drafts:
        groups.setdefault(tensors.first[site.weight], []).append(site)
    # A tied embedding and head are one site, seen as the head: a look-up multiplies nothing.
    return [sorted(same, key=lambda s: s.op == "embedding") for same in groups.values()]


def _settle(root: nn.Module, same: list[Site], tensors: Tensors, lazy: bool) -> Site:
    """Make one site of all that share a weight; it claims its bias if that is its own."""
    site = same[0]
    aliases = tensors.aliases(site.weight)
    rigid = site.rigid
    if aliases and not _one_place(root, site, aliases):
        rigid = f"tied with {aliases[0]}"
    bias = site.bias
    if bias:
        module = root.get_submodule(site.module)
        others = [n for n in tensors.aliases(bias) if _owner(root, n) is not module]
        blocked = f"tied with {others[0]}" if others else unfit(tensors.by_name[bias], lazy)
        if not blocked and bias in tensors.overlaps:
            blocked = f"it shares part of its memory with {tensors.overlaps[bias]}"
        if blocked or tensors.by_name[bias].numel() == 0:
            bias = ""
            rigid = rigid or f"its bias stays as it is: {blocked or 'it is empty'}"
    return replace(site, aliases=aliases, rigid=rigid, bias=bias)


def _owner(root: nn.Module, name: str) -> nn.Module:
    return root.get_submodule(name.rpartition(".")[0])


def _one_place(root: nn.Module, site: Site, aliases: tuple[str, ...]) -> bool:
    """Whether all names lead through one slot of one parent: one replacement serves them all."""
    module = root.get_submodule(site.module)
    slots = set()
    for name in (site.weight, *aliases):
        path = name.rpartition(".")[0]
        if root.get_submodule(path) is not module:
            return False
        parent, _, leaf = path.rpartition(".")
        slots.add((id(root.get_submodule(parent)), leaf))
    return len(slots) == 1


def _place(site: Site, same: list[Site], uses: Uses) -> tuple[Site, list[Refusal]]:
    """Add what the forward pass showed: positions over all uses, input sizes, and raw reads."""
    counted = [s for s in same if s.op == site.op or s.op != "embedding"]
    positions = sum(uses.positions.get(s.weight, 0.0) for s in counted)
    called = any(s.weight in uses.calls for s in same)
    reader = next((uses.raw[s.weight] for s in same if s.weight in uses.raw), "")
    if reader and not called:
        positions, called = 1.0, True  # it was used in a way that is not known
    rigid = site.rigid or (f"its weight or bias is read raw by {reader}" if reader else "")
    note = (
        [] if called else [Refusal(site.name, "statistics", "never called by the example inputs")]
    )
    sizes = frozenset[tuple[int, ...]]().union(*(uses.extents.get(s.weight, ()) for s in same))
    extent = next(iter(sizes)) if len(sizes) == 1 else ()
    return replace(site, positions=positions, rigid=rigid, extent=extent), note


def _read_elsewhere(site: Site, readers: Mapping[str, list[Op]], tensors: Tensors) -> str:
    """Return why a layer is rigid, if an op outside it reads its tensors in the data flow."""
    paths = {name.rpartition(".")[0] for name in (site.weight, *site.aliases)}
    for name in (site.weight, site.bias):
        for op in readers.get(tensors.first[name], ()) if name else ():
            if not any(op.module == path or op.module.startswith(f"{path}.") for path in paths):
                return f"its weight or bias is read raw by {op.module or 'the network itself'}"
    return ""


def _unknown(
    root: nn.Module, rest: Iterable[str], tensors: Tensors, explained: set[str]
) -> list[Refusal]:
    parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    return [
        Refusal(name, "parameter", "no layer type is known that uses it so; coded losslessly only")
        for name in rest
        if name in parameters
        and name not in explained
        and tensors.by_name[name].dim() > 1
        and tensors.by_name[name].numel() > 0
    ]


def _extra_state(root: nn.Module) -> list[Refusal]:
    why = "extra state is no tensor of the network; it is not stored"
    return [
        Refusal(join(path, "_extra_state"), "state", why)
        for path, module in root.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
