"""The pseudo loss has the loss's curvature, and the divergence is the textbook's."""

from __future__ import annotations

import pytest
import torch

from lamina.measure.loss import (
    Loss,
    decide_loss,
    divergence,
    pooled,
    pseudo_loss,
    relative_level,
)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_have_the_fisher_as_second_moment(temperature: float) -> None:
    logits = torch.tensor([2.0, 0.0, -1.0]).expand(40_000, 3).clone().requires_grad_()
    loss = Loss("logits", 1, temperature)
    scalar = pseudo_loss(loss, logits, torch.Generator().manual_seed(0))
    (g,) = torch.autograd.grad(scalar, logits)
    p = (logits[0].detach() / temperature).softmax(0)
    fisher = (torch.diag(p) - torch.outer(p, p)) / temperature**2
    torch.testing.assert_close(g.T @ g / 40_000, fisher, atol=3e-3, rtol=0.03)


def test_divergence_is_torchs_kl_at_any_place_of_the_classes() -> None:
    a, b = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    found = divergence(Loss("logits", 1), a, b)
    expected = torch.nn.functional.kl_div(
        b.log_softmax(1), a.log_softmax(1), reduction="none", log_target=True
    )
    torch.testing.assert_close(found, expected.flatten(1).sum(1).double(), rtol=1e-4, atol=1e-5)


def test_masked_tokens_and_forbidden_classes_do_not_count() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = divergence(Loss("logits", 2), a, b, mask)
    b[0, 2] += 100
    b[1, 1:, 0] -= 50
    torch.testing.assert_close(divergence(Loss("logits", 2), a, b, mask), found)
    a[..., 0] = b[..., 0] = -torch.inf
    assert divergence(Loss("logits", 2), a, b).isfinite().all()


def test_what_outputs_are() -> None:
    out, maps = torch.zeros(4, 7, 10), torch.zeros(4, 10, 8, 8)
    assert decide_loss("auto", None, out, torch.zeros(4, 7).long()) == Loss("logits", 2)
    assert decide_loss("auto", None, maps, torch.zeros(4, 8, 8).long()) == Loss("logits", 1)
    assert decide_loss("logits", None, maps, None) == Loss("logits", 1)
    assert decide_loss("logits", None, out, None) == Loss("logits", 2)
    assert decide_loss("auto", None, out, torch.full((4, 7), 10)) == Loss("features")
    assert decide_loss("auto", None, out, torch.zeros(4, 7)) == Loss("features")
    assert decide_loss("logits", None, torch.zeros(4, 1), None) == Loss("features")


def embeddings(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(5, 7, 4, generator=generator)
    mask = (torch.arange(7) < torch.arange(3, 8)[:, None]).long()
    return tokens, mask


def test_embeddings_are_mean_directions_without_padding() -> None:
    tokens, mask = embeddings(0)
    wanted = torch.stack([
        torch.nn.functional.normalize(t[: int(m.sum())].mean(0), dim=0)
        for t, m in zip(tokens, mask, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(pooled(tokens, mask), wanted)
    padded = torch.where(mask[..., None] == 0, torch.full_like(tokens, torch.nan), tokens)
    torch.testing.assert_close(pooled(padded, mask), wanted)
    torch.testing.assert_close(pooled(tokens), pooled(tokens, torch.ones(5, 7)))
    assert not torch.allclose(pooled(tokens), wanted)  # the control: padding does matter
    torch.testing.assert_close(pooled(wanted), wanted)


def test_divergence_of_embeddings_is_one_minus_the_cosine() -> None:
    (a, mask), (b, _) = embeddings(1), embeddings(2)
    found = divergence(Loss("embedding"), a, b, mask)
    cosine = (pooled(a, mask) * pooled(b, mask)).sum(1)
    torch.testing.assert_close(found.float(), 1 - cosine, atol=1e-6, rtol=1e-5)
    assert relative_level(Loss("embedding"), a) == pytest.approx(0.0025)
    assert decide_loss("embedding", None, a, None) == Loss("embedding")


def test_gradients_of_embeddings_have_the_curvature_of_the_divergence() -> None:
    tokens, mask = embeddings(3)
    tokens = tokens[:1].double().requires_grad_()
    moment = torch.zeros(28, 28, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    for _ in range(draws):
        scalar = pseudo_loss(Loss("embedding"), tokens, generator, mask[:1])
        (g,) = torch.autograd.grad(scalar, tokens)
        moment += torch.outer(g.flatten(), g.flatten()) / draws
    assert not bool(moment.reshape(7, 4, 7, 4)[3:].any()), "padding has no gradient"
    before = tokens.detach()
    hessian = torch.autograd.functional.hessian(
        lambda t: 0.5 * (pooled(t, mask[:1]) - pooled(before, mask[:1])).square().sum(), before
    )
    torch.testing.assert_close(moment, hessian.reshape(28, 28), atol=0.02, rtol=0.1)
