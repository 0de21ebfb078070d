"""Predictions from a sample, against `rdoq` on the whole layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lamina.errors import SiteError
from lamina.methods.base import get_method
from lamina.methods.rdoq.problem import pose
from lamina.methods.rdoq.rounding import quantize
from lamina.network.sites import Site
from lamina.streaming import sampled

SITE = Site("fc", module="fc", weight="w", bias="b", shape=(384, 700))


def lazily(**tensors: torch.Tensor) -> Any:
    """Return tensors that are read by rows."""

    def rows(name: str, first: int, last: int) -> torch.Tensor:
        t = tensors[name]
        return t.reshape(t.shape[0] if t.dim() > 1 else 1, -1)[first:last]

    stored = {n: SimpleNamespace(rows=t.shape[0] if t.dim() > 1 else 1) for n, t in tensors.items()}
    return SimpleNamespace(
        state=tensors, stored=stored, rows=rows, tensor=tensors.__getitem__,
        chunks=lambda name, size: [tensors[name]],
    )  # fmt: skip


def weights(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    W = 0.02 * torch.randn(384, 700)
    if kind == "spiked":  # one direction far above all others
        W += 0.01 * torch.randn(384, 1) @ torch.randn(1, 700)
    if kind == "uneven":  # heavy tails, and rows of other sizes
        W = torch.distributions.Laplace(0, 0.02).sample((384, 700)) * torch.rand(384, 1).exp() ** 2
    return {"w": W, "b": 0.02 * torch.randn(384)}


@pytest.mark.parametrize("kind", ["plain", "spiked", "uneven"])
def test_predictions_are_near_the_truth(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(sampled, "SHORT", 0)
    monkeypatch.setattr(sampled, "SAMPLE", 1 << 17)  # half of the rows
    given = weights(kind)
    offers, late = sampled.offers_of(lazily(**given), SITE, [get_method("rdoq")])
    assert not late and len(offers) > 20
    tensors = {"weight": given["w"], "bias": given["b"]}
    problem = pose(SITE, tensors, None)
    rms = float(given["w"].square().mean().sqrt())
    checked = 0
    for offer in offers[::4]:
        step = offer.steps[0].settings["step"]
        result = quantize(problem, tensors, step, 0.0)
        if step < 1.5 * rms:  # beyond, what is left is not worth a layer
            assert offer.error == pytest.approx(result.error, rel=0.06)
            assert offer.cost.bits / 8 == pytest.approx(result.size(), rel=0.03)
            checked += 1
    assert checked >= 5


def test_the_norm_is_that_of_lapack() -> None:
    given = weights("spiked")
    whole = torch.cat([given["w"], given["b"][:, None]], 1).double()
    expected = float(torch.linalg.matrix_norm(whole, 2))
    assert sampled.spectral_norm(lazily(**given), SITE) == pytest.approx(expected, rel=1e-3)


def test_groups_have_norms_of_their_own() -> None:
    W = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    site = Site("c", op="conv", module="c", weight="w", shape=(6, 4, 3, 3), groups=2)
    both = torch.linalg.matrix_norm(W.reshape(2, 3, 36).double(), 2)
    assert sampled.spectral_norm(lazily(w=W), site) == pytest.approx(float(both.max()), rel=1e-3)


def test_a_slow_method_is_left_out_of_a_long_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "SHORT", 0)
    monkeypatch.setattr(sampled, "WHOLE", 1000)
    methods = [get_method(name) for name in ("keep", "rdoq", "kmeans")]
    offers, late = sampled.offers_of(lazily(**weights("plain")), SITE, methods)
    assert late == ["kmeans"]
    assert {c.steps[0].method for c in offers} == {"keep", "rdoq"}
    dearest = offers[0]
    assert dearest.error == 0 and dearest.cost.bits == pytest.approx(
        8 * get_method("keep").propose(SITE, {"weight": weights("plain")["w"]}, None)[0].cost.bits
        / 8, rel=0.02,
    )  # fmt: skip


def test_weights_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "SHORT", 0)
    given = weights("plain")
    given["w"][5, 5] = np.nan
    with pytest.raises(SiteError, match="not finite at fc"):
        sampled.offers_of(lazily(**given), SITE, [get_method("rdoq")])
