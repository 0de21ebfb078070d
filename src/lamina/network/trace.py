"""The data flow of a network, as plain data; the only file that knows `torch.export`."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch

from lamina.network.isolate import NO_INPUTS, isolated, one_line
from lamina.network.source import Network


@dataclass(frozen=True)
class Op:
    """One operation of the data flow.

    Args:
        name: unique name.
        target: short name, in place or not: `"linear"`, `"conv2d"`, `"relu"`, `"add"`.
        module: path of the innermost module whose forward ran it (`""`: the network itself).
        inputs: names of the ops and network inputs it reads, each once, in order.
        params: names of the parameters and buffers it reads; of tied ones, one name.
        shape: shape of its result; `()` also where it is not one tensor.
    """

    name: str
    target: str
    module: str = ""
    inputs: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Flow:
    """The operations of one forward pass, in order, with the names of its inputs and outputs."""

    ops: tuple[Op, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def readers(self, first: Mapping[str, str]) -> dict[str, list[Op]]:
        """Return the ops that read each parameter or buffer, in order.

        Args:
            first: name -> the first name of the same tensor, to which ties are brought together.
        """
        found: dict[str, list[Op]] = {}
        for op in self.ops:
            for name in dict.fromkeys(first.get(name, name) for name in op.params):
                found.setdefault(name, []).append(op)
        return found

    def followers(self) -> dict[str, list[Op]]:
        """Return the ops that read each op's result, in order.

        Parts of a result that nobody reads (the indices of a pooling) are left out.
        """
        read = {name for op in self.ops for name in op.inputs}.union(self.outputs)
        found: dict[str, list[Op]] = {}
        for op in self.ops:
            if op.target == "getitem" and op.name not in read:
                continue
            for name in op.inputs:
                found.setdefault(name, []).append(op)
        return found


def trace(network: Network) -> Flow | str:
    """Return the data flow of a network at its example inputs, or one line why it cannot be had.

    A copy in evaluation mode is exported (non-strict); the network is not changed.

    Example:
        >>> from torch import nn
        >>> net = Network(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (torch.zeros(1, 3),))
        >>> [(op.target, op.module, op.params) for op in trace(net).ops]
        [('linear', '0', ('0.weight', '0.bias')), ('relu', '1', ())]
    """
    if not network.example_inputs and not network.example_kwargs:
        return NO_INPUTS
    try:
        with isolated(network) as (module, args, kwargs), _quiet():
            program = torch.export.export(module, args, kwargs, strict=False)
    except Exception as error:  # whatever a user's forward or export itself may raise
        return f"torch.export failed: {one_line(error)}"
    return _read(program)


def _read(program: Any) -> Flow:
    signature = program.graph_signature
    given = set(signature.user_inputs)  # a list that is made anew at each look
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    ops: list[Op] = []
    inputs: list[str] = []
    outputs: tuple[str, ...] = ()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in given:
                inputs.append(node.name)
        elif node.op == "output":
            outputs = tuple(n.name for n in node.all_input_nodes if n.name not in lifted)
        elif node.op == "call_function" and not _short(node.target).startswith("_assert"):
            ops.append(_op(node, lifted))
    flow = {*inputs, *(op.name for op in ops)}
    return Flow(
        tuple(
            Op(
                o.name,
                o.target,
                o.module,
                tuple(n for n in o.inputs if n in flow),
                o.params,
                o.shape,
            )
            for o in ops
        ),
        tuple(inputs),
        tuple(n for n in outputs if n in flow),
    )


def _op(node: Any, lifted: dict[str, str]) -> Op:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values()))), "")
    value = node.meta.get("val")
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    return Op(
        name=node.name,
        target=_short(node.target),
        module=path,
        inputs=tuple(n.name for n in node.all_input_nodes if n.name not in lifted),
        params=tuple(lifted[n.name] for n in node.all_input_nodes if n.name in lifted),
        shape=tuple(int(n) if isinstance(n, int) else -1 for n in shape),
    )


def _short(target: Any) -> str:
    """`aten.relu_.default` -> `relu`; a Python function keeps its name."""
    schema = getattr(target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(target, "__name__", "")
    return name.rstrip("_") or name or str(target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch logs and prints while an export fails; the reason is returned instead."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
