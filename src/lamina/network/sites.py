"""Sites: the places of a network that can be compressed, and the matrices they are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

STRUCTURAL = ("linear", "conv")  # operations whose form may be replaced by a pair of layers


@dataclass(frozen=True)
class Site:
    """One place where something can be compressed.

    A `layer` site is one weight tensor and, where there is one, its bias; a `chain` site is a run
    of layers and what is between them; a `family` site are layers of one role and shape. A site is
    described by names, shapes and integers only, so that a layer which does not exist yet (a factor
    of a low rank pair) is as good as a real one.

    Args:
        name: unique name; a layer's module path (`"conv1"`), or the parameter name where one module
            holds several weights (`"lstm.weight_ih_l0"`).
        kind: `"layer"`, `"chain"` or `"family"`.
        op: `"linear"`, `"conv"`, `"conv_transpose"`, `"embedding"` or `"recurrent"` (layer sites).
        module: module path of the layer.
        weight: parameter name of the weight, e.g. `"conv1.weight"`.
        bias: parameter name of the bias, or `""`.
        shape: shape of the weight as stored.
        groups: number of groups; the weight is `groups` independent matrices.
        transposed: the weight is stored `[in, out]` (Hugging Face Conv1D).
        kernel, stride, padding, dilation: geometry of convolutions; padding is a tuple of numbers
            (per side, symmetric) or a 1-tuple with `"same"`.
        padding_mode: of convolutions.
        positions: output positions per sample at which the weight is applied (tokens, pixels,
            calls).
        extent: spatial sizes of a convolution's input, where every call that was seen had the
            same; `()`: unknown.
        rigid: why the layer's form must stay (`""`: it may be replaced); values may change anyway.
        aliases: other parameter names that are the same tensor (tied weights).
        members: names of the layer sites of a chain or a family, in the order they run.
        between: what lies between two members of a chain, e.g.
            `(("relu",), ("max_pool2d", "flatten"))`.
        through: parallel to `between`: the path of the module that does this alone and once;
            `""`: a call, or a module that runs elsewhere too.
    """

    name: str
    kind: str = "layer"
    op: str = "linear"
    module: str = ""
    weight: str = ""
    bias: str = ""
    shape: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int | str, ...] = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    positions: float = 1.0
    extent: tuple[int, ...] = ()
    rigid: str = ""
    aliases: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    between: tuple[tuple[str, ...], ...] = ()
    through: tuple[tuple[str, ...], ...] = ()

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """Shape `[groups, out, in]` of the weight seen as matrices (see `as_matrix`)."""
        return tuple(as_matrix(self, torch.empty(self.shape, device="meta")).shape)  # type: ignore[return-value]

    @property
    def macs(self) -> float:
        """Multiply-accumulates per sample; a table look-up (embedding) costs none."""
        if self.op == "embedding":
            return 0.0
        size = 1
        for n in self.shape:
            size *= n
        return size * self.positions


def as_matrix(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """Return a layer's weight as independent matrices `[groups, out, in]` acting on input columns.

    linear `[g*out, in]`, or of experts `[g, out, in]`; conv `[g*out, in, *kernel]` (a column is an
    unfolded patch, channel first); conv_transpose `[g*in, out, *kernel]` gives `[g, out*K, in]`;
    embedding `[rows, dim]` gives `[1, dim, rows]` (a column is one-hot).

    Example:
        >>> as_matrix(Site("c", op="conv", groups=2), torch.zeros(4, 3, 5, 5)).shape
        torch.Size([2, 2, 75])
    """
    g = site.groups
    if site.op == "embedding" or site.transposed:
        return weight.T.unsqueeze(0)
    if site.op == "conv_transpose":
        return weight.reshape(g, weight.shape[0] // g, -1).transpose(1, 2)
    if site.op == "linear" and weight.dim() == 3:
        return weight
    return weight.reshape(g, weight.shape[0] // g, -1)


def from_matrix(site: Site, matrix: torch.Tensor) -> torch.Tensor:
    """Undo `as_matrix`: return the weight in its stored shape."""
    if site.op == "embedding" or site.transposed:
        return matrix.squeeze(0).T.reshape(site.shape)
    if site.op == "conv_transpose":
        return matrix.transpose(1, 2).reshape(site.shape)
    return matrix.reshape(site.shape)


@dataclass(frozen=True)
class Refusal:
    """Something that was given up, and why; refusals are data for the report, not errors."""

    where: str
    what: str
    why: str


@dataclass(frozen=True)
class Sites:
    """What discovery found: sites, refusals, and the tensors no site claims (coded losslessly)."""

    layers: tuple[Site, ...]
    chains: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    rest: tuple[str, ...] = ()
    traced: bool = True
    families: tuple[Site, ...] = ()

    def __getitem__(self, name: str) -> Site:
        for site in (*self.layers, *self.chains, *self.families):
            if site.name == name:
                return site
        first, _, last = name.partition("..")
        for chain in self.chains:
            if first in chain.members and last in chain.members:
                start, end = chain.members.index(first), chain.members.index(last)
                if start < end:
                    return cut(chain, start, end)
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        try:
            self[name]
        except KeyError:
            return False
        return True


def cut(chain: Site, first: int, last: int) -> Site:
    """Return the part of a chain from one member to another, both included.

    Example:
        >>> whole = Site("a..c", "chain", members=("a", "b", "c"), between=(("relu",), ()))
        >>> cut(whole, 0, 1).name, cut(whole, 0, 1).between
        ('a..b', (('relu',),))
    """
    members = chain.members[first : last + 1]
    return replace(
        chain,
        name=f"{members[0]}..{members[-1]}",
        members=members,
        between=chain.between[first:last],
        through=chain.through[first:last],
    )
