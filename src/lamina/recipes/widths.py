"""Inner widths: the channels between two layers that nobody else reads, and can so be fewer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from lamina.errors import LaminaError
from lamina.forms import Edit, Plain, find_tensor, install, widths
from lamina.network.sites import Refusal, Site, Sites
from lamina.network.source import Network
from lamina.network.tensors import named_tensors
from lamina.network.trace import Flow, Op, trace
from lamina.plan.apply import copy_module

# What acts on every value of a channel alone, or on every channel alone.
ACTIVATIONS = frozenset(
    {"relu", "relu6", "leaky_relu", "rrelu", "elu", "celu", "selu", "gelu", "silu", "mish"}
    | {"hardtanh", "hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus", "softsign"}
    | {"softshrink", "hardshrink", "tanhshrink", "logsigmoid", "log_sigmoid", "threshold"}
)
PASSING = frozenset(
    {"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "flatten", "mean"}
    | {"amax", "contiguous", "clone", "detach", "alias", "getitem", "view", "reshape"}
    | {f"{kind}_pool{n}d" for n in (1, 2, 3) for kind in ("max", "avg")}
    | {f"adaptive_{kind}_pool{n}d" for n in (1, 2, 3) for kind in ("max", "avg")}
)
CLOSE = 1e-3  # of the largest output: how near a trial must come


@dataclass(frozen=True)
class Width:
    """The channels between two layers.

    Args:
        producer, consumer: the layers; channel i is row i of the first one's weight.
        channels: how many there are.
        repeat: inputs of the consumer that one channel becomes (pixels, where a map is flattened).
        norms: module paths of the BatchNorms between.
        between: what lies between, in order: (operation, module that ran it).
        after: module path of the BatchNorm that reads the consumer, or `""`.
    """

    producer: Site
    consumer: Site
    channels: int
    repeat: int = 1
    norms: tuple[str, ...] = ()
    between: tuple[tuple[str, str], ...] = ()
    after: str = ""

    @property
    def name(self) -> str:
        return f"{self.producer.name} -> {self.consumer.name}"

    def inputs(self, channels: torch.Tensor) -> torch.Tensor:
        """Return the consumer's inputs (dimension 1 of its weight) that are these channels."""
        return (channels[:, None] * self.repeat + torch.arange(self.repeat)).flatten()


def find_widths(network: Network, sites: Sites) -> tuple[tuple[Width, ...], tuple[Refusal, ...]]:
    """Return the inner widths of a network, and those links of its chains that are none, and why.

    What the data flow says is tried out: with one channel less a network must run, and give what it
    gives when the next layer does not look at that channel.

    Args:
        network: with example inputs.
        sites: from `discover`; their chains say which layers follow each other.
    """
    pairs = [pair for c in sites.chains for pair in pairwise(c.members)]
    flow = trace(network) if pairs else ""
    if isinstance(flow, str):
        return (), (Refusal("widths", "filter pruning", flow),) if flow else ()
    walk = _Walk(network.module, flow)
    found: list[Width] = []
    refusals: list[Refusal] = []
    for first, second in pairs:
        width = walk.width(sites[first], sites[second])
        if isinstance(width, Width):
            found.append(width)
        else:
            refusals.append(Refusal(f"{first} -> {second}", "filter pruning", width))
    if found and _trial(network, found):
        for width in tuple(found):
            if why := _trial(network, [width]):
                found.remove(width)
                refusals.append(Refusal(width.name, "filter pruning", why))
    return tuple(found), tuple(refusals)


class _Walk:
    """Follows the data flow of one network from layer to layer."""

    def __init__(self, root: nn.Module, flow: Flow) -> None:
        self.root, self.ops = root, {op.name: op for op in flow.ops}
        self.tensors = named_tensors(root)
        self.readers = flow.readers(self.tensors.first)
        self.outputs, self.after = set(flow.outputs), flow.followers()
        self.paths: dict[int, list[str]] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), []).append(path)

    def width(self, producer: Site, consumer: Site) -> Width | str:
        """Return the width between two layers, or why there is none to prune."""
        for site in (producer, consumer):
            if site.rigid:
                return f"{site.name} must stay as it is: {site.rigid}"
            if site.groups > 1:
                return f"{site.name} is in groups"
            if widths(self.root.get_submodule(site.module)) is None:
                kind = type(self.root.get_submodule(site.module)).__name__
                return f"no form makes a {kind} narrower ({site.name})"
        channels = widths(self.root.get_submodule(producer.module))[1]  # type: ignore[index]
        inputs = widths(self.root.get_submodule(consumer.module))[0]  # type: ignore[index]
        if channels < 2:
            return "there is one channel"
        if inputs % channels or (inputs != channels and consumer.op != "linear"):
            return f"{channels} channels become {inputs} inputs"
        ops = self._path(producer, consumer)
        if isinstance(ops, str):
            return ops
        norms: list[str] = []
        for op in ops:
            if op.target == "batch_norm":
                if why := self._unfit(op, channels):
                    return why
                norms.append(op.module)
            elif op.target not in ACTIVATIONS | PASSING or op.params:
                return f"it is not known that {op.target} acts on every channel alone"
        between = tuple((op.target, op.module) for op in ops)
        after = self._norm_after(consumer)
        return Width(producer, consumer, channels, inputs // channels, tuple(norms), between, after)

    def _path(self, producer: Site, consumer: Site) -> list[Op] | str:
        ops: list[Op] = []
        here = self._op(producer)
        while here is not None:
            after = self.after.get(here.name, [])
            if here.name in self.outputs or len(after) != 1:
                break
            here = after[0]
            if consumer.weight in here.params:
                return ops
            ops.append(here)
        return "the way between them is not known operation by operation"

    def _op(self, site: Site) -> Op | None:
        uses = self.readers.get(site.weight, [])
        return uses[0] if len(uses) == 1 else None

    def _unfit(self, op: Op, channels: int) -> str:
        """Return why the norm of an operation cannot lose channels, or `""`."""
        module = self.root.get_submodule(op.module)
        if widths(module) != (channels, channels) or isinstance(module, nn.Linear):
            return f"its batch_norm is no BatchNorm of {channels} channels ({op.module})"
        runs = [o for o in self.ops.values() if o.module == op.module and o.target == op.target]
        names = [f"{op.module}.{leaf}" for leaf in (*module._parameters, *module._buffers)]
        tied = any(name in self.tensors.first and self.tensors.aliases(name) for name in names)
        if len(runs) != 1 or len(self.paths[id(module)]) != 1 or tied:
            return f"{op.module} is used more than once"
        return ""

    def _norm_after(self, site: Site) -> str:
        here = self._op(site)
        after = self.after.get(here.name, []) if here is not None else []
        if here is None or here.name in self.outputs or len(after) != 1:
            return ""
        outputs = widths(self.root.get_submodule(site.module))[1]  # type: ignore[index]
        op = after[0]
        return op.module if op.target == "batch_norm" and not self._unfit(op, outputs) else ""


def narrow_edits(
    module: nn.Module,
    found: Sequence[Width],
    kept: Mapping[str, torch.Tensor],
    changed: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[Edit], list[Edit]]:
    """Return the edits that leave these channels: of structure and parameters, and of buffers.

    Args:
        module: the original.
        found: the widths.
        kept: by name of the width, the channels that stay, ascending; of others all stay.
        changed: tensors that shall hold other values than the original's, by name, at full size.
    """
    rows: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    names: dict[str, tuple[str, ...]] = {}
    for width in found:
        stay = kept.get(width.name)
        if stay is None or len(stay) == width.channels:
            continue
        rows[width.producer.module] = stay
        columns[width.consumer.module] = width.inputs(stay)
        for path in width.norms:
            rows[path] = columns[path] = stay
    changed = changed or {}
    edits: list[Edit] = []
    buffers: list[Edit] = []
    for path in (*dict.fromkeys((*rows, *columns)),):
        part = module.get_submodule(path)
        now = widths(part)
        assert now is not None
        inputs = len(columns[path]) if path in columns else now[0]
        outputs = len(rows[path]) if path in rows else now[1]
        edits.append(Edit(path, "narrow", {"inputs": inputs, "outputs": outputs}))
        for leaf, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None or not tensor.dim():
                continue
            name = f"{path}.{leaf}" if path else leaf
            names[name] = (path, leaf)
            value = changed.get(name, tensor).detach()
            value = value[rows[path].to(value.device)] if path in rows else value
            if value.dim() > 1 and path in columns:
                value = value[:, columns[path].to(value.device)]
            edit = Edit(name, "values", values=Plain(value.to(tensor.dtype).clone()))
            (edits if leaf in part._parameters else buffers).append(edit)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in changed.items():
        if name not in names:
            like = find_tensor(module, name)
            edit = Edit(name, "values", values=Plain(tensor.detach().to(like.dtype).clone()))
            (edits if name in parameters else buffers).append(edit)
    return edits, buffers


def masked(
    module: nn.Module, found: Iterable[Width], kept: Mapping[str, torch.Tensor]
) -> nn.Module:
    """Return a copy whose layers do not look at the channels that would go; nothing is smaller."""
    copy = copy_module(module)
    for width in found:
        stay = kept.get(width.name)
        if stay is None:
            continue
        gone = torch.ones(width.channels, dtype=torch.bool)
        gone[stay] = False
        with torch.no_grad():
            weight = find_tensor(copy, width.consumer.weight)
            weight[:, width.inputs(gone.nonzero().flatten()).to(weight.device)] = 0
    return copy


def _trial(network: Network, found: Sequence[Width]) -> str:
    """Return why a network does not do with one channel less in each of these widths, or `""`."""
    kept = {}
    for width in found:
        channels = torch.arange(width.channels)
        kept[width.name] = channels[channels != width.channels // 2]
    edits, buffers = narrow_edits(network.module, found, kept)
    small = copy_module(network.module)
    try:
        install(small, (*edits, *buffers))
        after = _run(network, small)
    except (LaminaError, RuntimeError, ValueError, IndexError, TypeError) as error:
        text = str(error).strip().splitlines()
        return f"the network does not run with a channel less: {text[0] if text else error!r}"
    before = _run(network, masked(network.module, found, kept))
    if before.shape != after.shape:
        return "with a channel less its output has another shape"
    apart = (before - after).abs().max() if before.numel() else torch.zeros(())
    fine = bool(apart <= CLOSE * before.abs().max().clamp_min(1e-30))
    return "" if fine else "with a channel less it computes something else"


def _run(network: Network, module: nn.Module) -> torch.Tensor:
    trial = replace(network, module=module)
    return trial.forward(*network.example_inputs, **network.example_kwargs).float()
