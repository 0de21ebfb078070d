"""bf16: compute a linear layer in bfloat16.

**What.** The layer's weight is rounded to bfloat16 (8 significant bits), its input at every forward
pass, and what comes out becomes the network's dtype again; sums are float32's. The rest of the
network stays as it is.

**Where.** Linear layers and Hugging Face's Conv1D of networks in float32; the factors of a low rank
pair too. A step of stage VALUES, followed by any final method. Asked where a budget limits latency,
or by name: there it is the choice between nothing and `int8`, half the speed at a tenth of the
error.

**Costs and predicts.** Bytes of the rounded weight, coded losslessly. Parameters and MACs stay;
seconds are measured. The error is `1/2 tr(G dW H dW^T)` of the rounded weight, plus the same for
the rounded input, whose relative errors are independent: `1/2 tr(G W D W^T)`, `D = 2^-14 / 28
diag(H)`.

**Does not help** on machines without bfloat16 products, nor for few rows: what is not faster as
measured is left out of a plan for latency. For bytes alone, `rdoq` is far better.

**Reference.** Kalamkar et al. 2019, "A study of BFLOAT16 for deep learning training",
arXiv:1905.12322.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lamina.artifact.records import values_bytes
from lamina.errors import MethodError, SiteError
from lamina.forms import Edit, Plain
from lamina.measure.stats import Cost, LayerStats, predict_error
from lamina.methods.base import (
    Candidate,
    Choice,
    Leaf,
    Settings,
    Stage,
    Step,
    Weights,
    weights_of,
)
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network

# Mean square of the relative error of rounding x to 8 significant bits, x's significand uniform.
RELATIVE = 2.0**-14 / 28
NO_FORM = "no form replaces a Conv1D"  # says discovery; this one does


@dataclass(frozen=True)
class Bf16:
    """The method; see the card above."""

    name: str = "bf16"
    stage: Stage = Stage.VALUES
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset({"input_gram", "output_gram"})
    reference: str = "Kalamkar et al. 2019, arXiv:1905.12322"
    final: bool = False
    asked: bool = False  # only where it is named, or where
    saves_time: bool = True  # seconds count

    def refuse(self, site: Site) -> str:
        """Return why the layer cannot compute in bfloat16, or `""`."""
        if site.kind not in self.kinds:
            return f"it is a {site.kind}, not one layer"
        if site.op != "linear":
            return f"there is no layer in bfloat16 for the operation {site.op}"
        if site.rigid and site.rigid != NO_FORM:
            return site.rigid
        if site.groups != 1:
            return f"its {site.groups} blocks are multiplied one by one"
        return "" if site.module else "it is the whole network, and a form needs a place to be in"

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer the one candidate there is.

        Raises:
            SiteError: the weights are not finite.
        """
        weight = _finite(site, weights["weight"])
        if not weight.numel():
            return ()
        rounded = _rounded(weight)
        matrix, new = as_matrix(site, weight).double(), as_matrix(site, rounded).double()
        error = predict_error(stats, matrix, new - matrix)
        if stats is None:
            error += RELATIVE**0.5
        else:
            second = stats.H if stats.H.dim() == 2 else stats.H.diagonal(dim1=-2, dim2=-1)
            noise = replace(stats, H=RELATIVE * second)
            error += predict_error(noise, matrix, matrix)
        other = sum(values_bytes(t) for key, t in weights.items() if key != "weight")
        bits = 8.0 * (values_bytes(rounded) + other)
        cost = Cost(sum(t.numel() for t in weights.values()), bits, site.macs)
        return (Candidate(site.name, (Step(self.name, site.name, {"bits": 16}),), cost, error),)

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return the same layer with its rounded weight; its form is its own from now on."""
        _check(settings)
        weight = _rounded(_finite(site, weights["weight"]))
        place = replace(site, rigid="it computes in bfloat16")
        return (Leaf(place, {**weights, "weight": weight}, stats),)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return the edit that changes what the layer computes in."""
        _check(settings)
        return (Edit(site.module, "bf16"),)

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the form, then the rounded weight.

        Raises:
            SiteError: the site is refused, or its weights are not finite.
            MethodError: the settings do not fit.
        """
        site = choice.site
        if why := self.refuse(site):
            raise SiteError(f"{self.name} cannot serve this site", site.name, why)
        edits = list(self.structure(site, choice.settings))
        weight = _rounded(_finite(site, weights_of(network, site)["weight"]))
        return [*edits, Edit(site.weight, "values", values=Plain(weight))]


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to(torch.bfloat16).to(weight.dtype)


def _check(settings: Settings) -> None:
    if dict(settings) != {"bits": 16}:
        why = "give bits=16, and nothing else"
        raise MethodError("bf16 does not have these settings", repr(dict(settings)), "", why)


def _finite(site: Site, weight: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise SiteError(
            "the weights are not finite", site.name, "NaN or inf cannot be rounded",
            "mend the network",
        )  # fmt: skip
    return weight


method = Bf16()
