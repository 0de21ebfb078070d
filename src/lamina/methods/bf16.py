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
from lamina.forms import Edit, Plain
from lamina.measure.stats import LayerStats, diagonal_of, predict_error
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Weights
from lamina.methods.layers import CONV1D, apply_weight, finite_weight, misfit, why_no_form
from lamina.methods.offers import offer_values, other_bytes
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network

BITS = 16
# Mean square of the relative error of rounding x to 8 significant bits, x's significand uniform.
RELATIVE = 2.0**-14 / 28


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
        return why_no_form(site, "layer in bfloat16", ("linear",), unless=CONV1D)

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer the one candidate there is.

        Raises:
            SiteError: the weights are not finite.
        """
        weight = finite_weight(site, weights)
        if not weight.numel():
            return ()
        rounded = _rounded(weight)
        matrix, new = as_matrix(site, weight).double(), as_matrix(site, rounded).double()
        error = predict_error(stats, matrix, new - matrix)
        if stats is None:
            error += RELATIVE**0.5
        else:
            noise = replace(stats, H=RELATIVE * diagonal_of(stats.H))
            error += predict_error(noise, matrix, matrix)
        size = values_bytes(rounded) + other_bytes(weights)
        return (offer_values(self.name, site, weights, {"bits": BITS}, size, error),)

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return the same layer with its rounded weight; its form is its own from now on."""
        _check(settings)
        weight = _rounded(finite_weight(site, weights))
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
        return apply_weight(self, network, choice, stats, Plain)


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to(torch.bfloat16).to(weight.dtype)


def _check(settings: Settings) -> None:
    if dict(settings) != {"bits": BITS}:
        raise misfit("bf16", settings, f"give bits={BITS}, and nothing else")


method = Bf16()
