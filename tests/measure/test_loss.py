"""The pseudo loss has the loss's curvature, and the divergence is the textbook's."""

from __future__ import annotations

import pytest
import torch

from lamina.measure.loss import Loss, decide_loss, divergence, pseudo_loss


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
