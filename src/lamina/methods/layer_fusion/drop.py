"""Dropping: which blocks of a network may become nothing, because a skip leads past them."""

from __future__ import annotations

from collections.abc import Collection

from lamina.errors import SiteError
from lamina.network.sites import Site
from lamina.network.source import Network
from lamina.network.tensors import named_tensors
from lamina.network.trace import Flow, Op, trace

ADDS = ("add",)
SAME = ("dropout", "contiguous", "clone", "detach", "alias", "to", "_to_copy", "view", "reshape")


def block_of(site: Site, member: int) -> str:
    """Return the module that holds a member of a family and stands beside those of the others.

    It is the path up to the first part in which the members differ.

    Example:
        >>> block_of(Site("f", "family", members=("blocks.0.mlp.fc1", "blocks.1.mlp.fc1")), 1)
        'blocks.1'
    """
    paths = [name.split(".") for name in site.members]
    depth = 0
    while all(len(p) > depth + 1 for p in paths) and len({p[depth] for p in paths}) == 1:
        depth += 1
    return ".".join(paths[member][: depth + 1])


def check_droppable(
    network: Network,
    path: str,
    covered: Collection[str] | None = None,
    flow: Flow | str | None = None,
) -> None:
    """Refuse to let a block become nothing where that would not leave a network that runs.

    Args:
        network: with example inputs.
        path: of the block's module.
        covered: names of the weights that may vanish with it; other weights with rows and columns
            may not. None: all may.
        flow: the data flow of the network, or why there is none, where that was looked at.

    Raises:
        SiteError: the block is no residual one, changes the shape, or holds what others need.
    """
    why = undroppable(network, path, covered, flow)
    if why:
        raise SiteError("a block cannot be dropped", path, why, "tie it instead: mode='tie'")


def undroppable(
    network: Network,
    path: str,
    covered: Collection[str] | None = None,
    flow: Flow | str | None = None,
) -> str:
    """Return why a block cannot become nothing, or `""`; see `check_droppable`."""
    found = flow if flow is not None else trace(network)
    if isinstance(found, str):
        return f"the data flow is not known: {found}"
    inside = [op for op in found.ops if op.module == path or op.module.startswith(f"{path}.")]
    if not inside:
        return "nothing runs in it"
    tensors = named_tensors(network.module)
    held = [n for n in tensors.by_name if n.startswith(f"{path}.")]
    for name in held:
        if any(not alias.startswith(f"{path}.") for alias in tensors.aliases(name)):
            return f"{name} is tied to a tensor outside of it"
        if covered is not None and name not in covered and tensors.by_name[name].dim() > 1:
            return f"it holds {name}, which is of another family"
    names = {op.name for op in inside}
    sources = {i for op in inside for i in op.inputs if i not in names}
    read = {i for op in found.ops if op.name not in names for i in op.inputs} | set(found.outputs)
    results = [op for op in inside if op.name in read]
    if len(sources) != 1 or len(results) != 1:
        return f"it reads {len(sources)} tensors and gives {len(results)}; one and one are needed"
    source = sources.pop()
    ops = {op.name: op for op in found.ops}
    if source in ops and ops[source].shape != results[0].shape:
        return f"it turns {ops[source].shape} into {results[0].shape}"
    if not _skips(results[0], source, ops, names):
        return "no skip leads past it, so the next block would see something else"
    return ""


def _skips(op: Op, source: str, ops: dict[str, Op], inside: Collection[str]) -> bool:
    """Whether additions alone lead from a block's input to an op: a trunk."""
    # A relu of what is not negative is the identity.
    clipped = op.target == "relu" and source in ops and ops[source].target == "relu"
    if op.target not in ADDS and not clipped and (op.target not in SAME or len(op.inputs) != 1):
        return False
    return any(
        name == source or (name in inside and _skips(ops[name], source, ops, inside))
        for name in op.inputs
    )
