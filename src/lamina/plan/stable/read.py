"""Reading a feed-forward ReLU network as steps in float64, or why it is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lamina.forms.edit import HOOKS
from lamina.forms.rewritten import KINDS, NORMS
from lamina.measure.bounds import Step, shapes_of
from lamina.network.chains import IDENTITY, RESHAPE
from lamina.network.isolate import clone
from lamina.network.source import Network
from lamina.network.tensors import Tensors, named_tensors
from lamina.network.trace import Flow, Op, trace

POOLS = {
    "max_pool": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg_pool": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    "adaptive_avg_pool": ("output_size",),
    "adaptive_max_pool": ("output_size",),
}
DROPOUTS = {"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}


@dataclass(frozen=True)
class Layer:
    """One layer with weights, and what lies between it and the next.

    Args:
        path: its module.
        origin: the module that had its outputs in the network as given.
        step: the layer itself.
        after: the steps that follow.
        relus: the module of each ReLU among them that runs there alone; `""`: it is called.
        units: for each output its number there.
        why: why none of its outputs can be removed; `""`: they can.
    """

    path: str
    origin: str
    step: Step
    after: tuple[Step, ...] = ()
    relus: tuple[str, ...] = ()
    units: tuple[int, ...] = ()
    why: str = ""

    @property
    def weight(self) -> Tensor:
        assert self.step.weight is not None
        return self.step.weight

    @property
    def bias(self) -> Tensor:
        bias = self.step.bias
        return torch.zeros(len(self.weight), dtype=torch.float64) if bias is None else bias

    @property
    def plain(self) -> bool:
        """Whether it is a linear layer that nothing but ReLUs follows."""
        return self.step.op == "linear" and {s.op for s in self.after} <= {"relu", "flatten"}

    def holding(self, weight: Tensor, bias: Tensor, **others: Any) -> Layer:
        """Return the layer with another weight and bias."""
        step = replace(self.step, weight=weight, bias=bias)
        return replace(self, step=step, **others)


@dataclass(frozen=True)
class Chain:
    """A feed-forward network: steps before the first layer, and its layers in order.

    Args:
        shape: of one sample of the input.
    """

    shape: tuple[int, ...]
    before: tuple[Step, ...]
    layers: tuple[Layer, ...]

    def steps(self) -> tuple[Step, ...]:
        """Return all steps in a row, as far as the last layer."""
        found = list(self.before)
        for layer in self.layers:
            found += [layer.step, *layer.after]
        return tuple(found[: len(found) - len(self.layers[-1].after)])

    def relu_of(self, number: int) -> int | None:
        """Return the index of the first ReLU after a layer among the steps, or None."""
        at = len(self.before) + sum(1 + len(layer.after) for layer in self.layers[:number])
        if number == len(self.layers) - 1:
            return None
        for i, step in enumerate(self.layers[number].after):
            if step.op == "relu":
                return at + 1 + i
        return None


def read_chain(network: Network) -> Chain | str:
    """Return a network as a chain, or why it is no feed-forward ReLU network.

    What follows the last layer may be anything: its outputs stay.

    Args:
        network: with one example input; BatchNorms that could be folded have been.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> chain = read_chain(Network(net, (torch.zeros(1, 3),)))
        >>> [(layer.path, layer.relus) for layer in chain.layers]
        [('0', ('1',)), ('2', ())]
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
        >>> read_chain(Network(net, (torch.zeros(1, 3),)))
        'gelu at 1 is no ReLU, pooling or flattening'
    """
    flow = trace(network)
    if isinstance(flow, str):
        return flow
    inputs = network.example_inputs
    if len(flow.inputs) != 1 or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return f"it has {len(flow.inputs)} inputs, and one tensor is needed"
    if inputs[0].dim() < 2 or not inputs[0].is_floating_point():
        return "its input is no batch of numbers"
    reader = _Reader(network.module, flow, tuple(inputs[0].shape))
    chain = reader.chain()
    if isinstance(chain, str):
        return chain
    why = _differs(network, chain)
    return why or chain


class _Reader:
    """Follows the data flow of one network from its input."""

    def __init__(self, root: nn.Module, flow: Flow, shape: tuple[int, ...]) -> None:
        self.root, self.flow, self.shape = root, flow, shape
        self.after, self.tensors = flow.followers(), named_tensors(root)
        self.readers = flow.readers(self.tensors.first)
        self.paths = Counter(id(m) for _, m in root.named_modules(remove_duplicate=False))
        self.ran = Counter(op.module for op in flow.ops)

    def chain(self) -> Chain | str:
        before: list[Step] = []
        layers: list[Layer] = []
        here, shape, why = self.flow.inputs[0], self.shape, ""
        while here not in self.flow.outputs:
            following = self.after.get(here, [])
            if len(following) != 1 or len(following[0].inputs) != 1:
                many = "is read more than once" if len(following) > 1 else "meets another"
                why = f"the result of {here} {many}: it is no plain chain of layers"
                break
            op = following[0]
            found = self._step(op, shape)
            if isinstance(found, str):
                why = found
                break
            steps, layer, relu = found
            if layer is not None:
                layers.append(layer)
            elif not layers:
                before += steps
            else:
                last = layers[-1]
                relus = last.relus if relu is None else (*last.relus, relu)
                layers[-1] = replace(last, after=(*last.after, *steps), relus=relus)
            here, shape = op.name, op.shape
        # Where the chain ends at something else, a layer that still follows belongs to no chain.
        if why and self._layers_after(here):
            return why
        if not layers:
            return "there is no layer"
        named = [self._reason(a, b) for a, b in pairwise(layers)]
        return Chain(self.shape[1:], tuple(before), (*named, layers[-1]))

    def _layers_after(self, name: str) -> bool:
        """Whether anything with a weight comes after a result, on any path."""
        reached, weighty = {name}, False
        for op in self.flow.ops:
            if reached.intersection(op.inputs):
                reached.add(op.name)
                weighty = weighty or bool(op.params)
        return weighty

    def _step(
        self, op: Op, shape: tuple[int, ...]
    ) -> tuple[list[Step], Layer | None, str | None] | str:
        """Return an op's steps, its layer if it is one, and its module if it is a ReLU."""
        module = self.root.get_submodule(op.module) if op.module else self.root
        where = f"{op.target} at {op.module or 'the network itself'}"
        alone = self.ran[op.module] == 1 and self.paths[id(module)] == 1 and op.module != ""
        if op.params and type(module) in KINDS and alone:
            return self._layer(op, module, shape, where)
        if op.target == "batch_norm" and type(module) in NORMS and alone:
            return [_scale(module)], None, None
        if op.params:
            return f"{where} is no layer of its own that runs once"
        if op.target == "relu":
            return [Step("relu")], None, op.module if alone and type(module) is nn.ReLU else ""
        if op.target in IDENTITY | DROPOUTS or (op.target in RESHAPE and op.shape == shape):
            return [], None, None
        if op.target in RESHAPE and op.shape == (shape[0], prod(shape[1:])):
            return [Step("flatten")], None, None
        dims = len(shape) - 2
        if op.target in ("mean", "amax") and dims in (1, 2, 3):
            rest = op.shape[2:]
            if (
                op.shape[:2] == shape[:2]
                and all(n == 1 for n in rest)
                and shape[1] not in shape[2:]
            ):
                name = "adaptive_avg_pool" if op.target == "mean" else "adaptive_max_pool"
                pool = Step(name, settings={"output_size": 1})
                return [pool] if rest else [pool, Step("flatten")], None, None
        name = op.target[:-2]
        if (
            name in POOLS
            and alone
            and type(module).__name__.lower().startswith(name.replace("_", ""))
        ):
            settings = {key: getattr(module, key) for key in POOLS[name]}
            return [Step(name, settings=settings)], None, None
        if op.target[:-2] in POOLS:
            return f"{where} is a call, whose settings are not known: make it a module"
        return f"{where} is no ReLU, pooling or flattening"

    def _layer(
        self, op: Op, module: nn.Module, shape: tuple[int, ...], where: str
    ) -> tuple[list[Step], Layer | None, str | None] | str:
        names = [f"{op.module}.{leaf}" for leaf, t in module._parameters.items() if t is not None]
        if any(self._shared(self.tensors, name) for name in names):
            return f"{where} shares its weight"
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"{where} has hooks"
        if any(type(module._parameters[n]) is not nn.Parameter for n in module._parameters
               if module._parameters[n] is not None):  # fmt: skip
            return f"{where} holds a tensor of a class of its own"
        weight: Any = module._parameters["weight"]
        bias: Any = module._parameters["bias"]
        wide = weight.detach().cpu().double()
        shift = None if bias is None else bias.detach().cpu().double()
        if not bool(wide.isfinite().all()):
            return f"{where} has weights that are no numbers"
        if isinstance(module, nn.Linear):
            if len(shape) != 2:
                return f"{where} runs at more than one position"
            step = Step("linear", wide, shift)
        else:
            conv: Any = module
            if conv.padding_mode != "zeros":
                return f"{where} pads with {conv.padding_mode}"
            keys = ("stride", "padding", "dilation", "groups")
            step = Step("conv", wide, shift, {key: getattr(conv, key) for key in keys})
        return [], Layer(op.module, op.module, step, units=tuple(range(len(wide)))), None

    def _shared(self, tensors: Tensors, name: str) -> bool:
        return bool(tensors.aliases(name)) or name in tensors.overlaps

    def _reason(self, layer: Layer, after: Layer) -> Layer:
        """Say why no output of a layer can be removed, where that is so."""
        why = ""
        if not any(step.op == "relu" for step in layer.after):
            why = "no ReLU follows it"
        elif any(step.op == "scale" for step in layer.after):
            why = "a BatchNorm follows it that belongs to no layer"
        elif any(s.settings.get("groups", 1) != 1 for s in (layer.step, after.step)):
            why = "its channels lie in groups"
        return replace(layer, why=why)


def _scale(module: nn.Module) -> Step:
    """Return a BatchNorm in evaluation mode as a factor and a shift per channel."""
    norm: Any = module
    mean, var = norm.running_mean.double().cpu(), norm.running_var.double().cpu()
    factor = 1 / (var + norm.eps).sqrt()
    shift = torch.zeros_like(mean)
    if norm.weight is not None:
        factor, shift = factor * norm.weight.detach().double().cpu(), norm.bias.detach().double()
    return Step("scale", factor, shift.cpu() - mean * factor)


def _differs(network: Network, chain: Chain) -> str:
    """Return why the steps are not the network on its example, where they are all of it."""
    from lamina.measure.bounds import run
    from lamina.network.isolate import isolated

    caught: list[Tensor] = []
    with isolated(network) as (module, args, kwargs), torch.no_grad():
        last = module.get_submodule(chain.layers[-1].path)
        handle = last.register_forward_hook(lambda _m, _a, out: caught.append(out.detach()))
        module(*args, **kwargs)
        handle.remove()
    if len(caught) != 1:
        return "its last layer does not run once"
    own = run(chain.steps(), clone(network.example_inputs[0]).detach().double().cpu())
    found = caught[0].double().cpu()
    close = 100 * torch.finfo(caught[0].dtype).eps ** 0.75
    if own.shape != found.shape or not torch.allclose(
        own, found, rtol=close, atol=close * float(own.abs().max().clamp_min(1))
    ):
        return "its layers in a row do not compute what it computes"
    return ""


def widths(chain: Chain) -> dict[str, int]:
    """Return how many outputs each layer but the last has."""
    return {layer.path: len(layer.weight) for layer in chain.layers[:-1]}


def columns(chain: Chain, number: int) -> int:
    """Return how many input columns of the next layer belong to one output of a layer."""
    layer, after = chain.layers[number], chain.layers[number + 1]
    return after.weight.shape[1] // len(layer.weight)


def shapes(chain: Chain) -> Sequence[torch.Size]:
    """Return the shape of one sample before each step, and after the last."""
    return shapes_of(chain.steps(), chain.shape)
