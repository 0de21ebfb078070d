"""Activations that are drawn towards the identity, so that the layers on both sides can collapse.

A chosen activation becomes a blend `(1 - t) act(x) + t x` of itself and the identity, with one
learned linearity t for the layer. It starts at t = 0, exactly the function it was: for a ReLU that
is a PReLU of slope t = 0, for GELU, SiLU and all others the same formula. Then t is pulled to 1.
In the place of the identity there may be a line for each unit, `s x + o`: what the unit does on
average, by least squares. The way there is much shorter where units are mostly off.

Reference: LayerCollapse (one PReLU slope a shared by a layer; a penalty on `(1 - a)^2`, or for
AdamW the same decoupled from the gradient's moments, without weight decay on a). Lines are ours; so
is that any activation starts as itself: a PReLU in the place of a GELU is another network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamina.errors import MethodError

PULLS = ("decoupled", "penalty")


@dataclass(frozen=True)
class Line:
    """What an activation is drawn to in the place of the identity: `scale * x + shift`.

    Args:
        scale, shift: `[units]`.
        axis: of the units.
    """

    scale: Tensor
    shift: Tensor
    axis: int = -1


class Blend(nn.Module):
    """An activation on its way to a line: `(1 - t) act(x) + t x`, or `... + t (s x + o)`.

    Bit-identical to the activation at t = 0, and to the line at t = 1.

    Args:
        activation: what it starts as; it acts on each value alone.
        linearity: t to start from.
        line: for each unit; None: the identity.

    Example:
        >>> Blend(nn.ReLU(), 0.25)(torch.tensor([-4.0, 4.0])).tolist()
        [-1.0, 4.0]
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self, activation: nn.Module, linearity: float = 0.0, line: Line | None = None
    ) -> None:
        super().__init__()
        self.activation = activation
        self.linearity = nn.Parameter(torch.tensor(float(linearity)))
        self.axis = -1 if line is None else line.axis
        for name in ("scale", "shift"):
            value = None if line is None else getattr(line, name).detach().to(torch.float32).clone()
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        bent: Tensor = self.activation(x)
        t = self.linearity.to(bent.dtype)
        if self.scale is not None and self.shift is not None:
            shape = [1] * x.dim()
            shape[self.axis] = -1
            x = x * self.scale.to(x.dtype).view(shape) + self.shift.to(x.dtype).view(shape)
        # lerp is exact at both ends, which (1 - t) * act + t * x is not
        return torch.lerp(bent, x.to(bent.dtype), t)

    @property
    def bend(self) -> float:
        """How far from the line: `|1 - t|`."""
        return abs(1.0 - float(self.linearity.detach()))

    @torch.no_grad()
    def snap(self) -> None:
        """Make it the line, for good: t = 1, and no longer trained."""
        self.linearity.fill_(1.0)
        self.linearity.requires_grad_(False)
        self.linearity.grad = None


@dataclass(frozen=True)
class Pull:
    """How hard blends are pulled to the identity.

    Args:
        how: `"decoupled"`: after each step of the optimizer `t <- t - lr g 2 (t - 1)`, which no
            moment of the gradient sees; `"penalty"`: `strength * sum (1 - t)^2` in the loss.
        strength: of a penalty, its factor; decoupled, the foldings of `1 - t` over a training: the
            pull alone leaves `exp(-strength)` of it, whatever the rate and the steps.
        tau: a blend nearer than this to the identity is snapped to it.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> Pull(strength=4.0).gain([0.5, 0.25, 0.25])
        2.0
    """

    how: str = "decoupled"
    strength: float = 5.0
    tau: float = 0.05

    def __post_init__(self) -> None:
        if self.how not in PULLS:
            raise MethodError("unknown pull", repr(self.how), "", f"choose from {', '.join(PULLS)}")
        for name, value in {"strength": self.strength, "tau": self.tau}.items():
            if not (math.isfinite(value) and value >= 0):
                raise MethodError(f"{name} is 0 or more", f"{name}={value!r}")

    def gain(self, rates: Iterable[float]) -> float:
        """Return g, with which these learning rates fold `1 - t` as often as was asked."""
        return self.strength / (2 * max(sum(rates), 1e-300))

    def penalty(self, blends: Sequence[Blend]) -> Tensor:
        """Return what the pull adds to the loss; decoupled: nothing."""
        if self.how != "penalty" or not blends:
            return torch.zeros(())
        return self.strength * penalty(blends)


def penalty(blends: Sequence[Blend]) -> Tensor:
    """Return `sum (1 - t)^2`, whose gradient is `-2 (1 - t)` each.

    Example:
        >>> float(penalty([Blend(nn.ReLU(), 0.5), Blend(nn.GELU(), 1.0)]).detach())
        0.25
    """
    return torch.stack([(1 - b.linearity).square() for b in blends]).sum()


@torch.no_grad()
def pull(blends: Iterable[Blend], lr: float, g: float) -> None:
    """Take one decoupled step on every blend: `1 - t` is multiplied by `1 - 2 lr g`.

    After steps of rates lr_i alone, `1 - t = (1 - t_0) prod (1 - 2 lr_i g)`.

    Args:
        blends: to pull; those that were snapped stay.
        lr: learning rate of this step.
        g: strength; `lr g` is held below 1/2, from where a step would go past 1.
    """
    step = min(lr * g, 0.5)
    for blend in blends:
        if blend.linearity.requires_grad:
            t = blend.linearity
            t.sub_(2 * step * (t - 1))


def snap(blends: Iterable[Blend], tau: float) -> int:
    """Snap what is nearer than tau to the identity; return how many were.

    Example:
        >>> near, far = Blend(nn.ReLU(), 0.99), Blend(nn.ReLU(), 0.9)
        >>> snap([near, far], 0.05), near.bend, round(far.bend, 6)
        (1, 0.0, 0.1)
    """
    near = [b for b in blends if b.linearity.requires_grad and b.bend < tau]
    for blend in near:
        blend.snap()
    return len(near)


def put_blends(
    module: nn.Module, paths: Iterable[str], lines: Mapping[str, Line] | None = None
) -> dict[str, Blend]:
    """Replace activations by their blends, in place; the function of the network stays.

    Args:
        module: the network.
        paths: module paths of the activations; what is a blend already stays as it is.
        lines: what they are drawn to, by path; of others it is the identity.

    Returns:
        the blends by path.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
        >>> put_blends(net, ["1"])["1"] is net[1]
        True
    """
    found = {}
    for path in paths:
        old = module.get_submodule(path)
        line = (lines or {}).get(path)
        blend = old if isinstance(old, Blend) else Blend(old, line=line)
        if blend is not old:
            like = next(iter(module.parameters()), None)
            blend.to(device=None if like is None else like.device).train(old.training)
            parent, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(parent), leaf, blend)
        found[path] = blend
    return found


def bends(blends: Mapping[str, Blend]) -> dict[str, float]:
    """Return how far from linear each blend is, by path."""
    return {path: blend.bend for path, blend in blends.items()}
