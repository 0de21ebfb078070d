from __future__ import annotations

import pytest
import torch
from tests.network.tiny import Counting, Uncopyable
from torch import nn

from lamina.network.discover import discover
from lamina.network.isolate import batch_size, clone, isolated, one_line
from lamina.network.load import check_network
from lamina.network.source import Network, digest


def state(module: nn.Module) -> tuple[object, ...]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    tensors = [*module.parameters(), *module.buffers()]
    flags = [m.training for m in module.modules()]
    return (
        hooks,
        flags,
        [(id(t), t._version if t.requires_grad else 0) for t in tensors],
        digest(module),
    )


@pytest.mark.parametrize("kind", [Counting, Uncopyable])
@pytest.mark.parametrize("work", [discover, check_network])
def test_nothing_is_left_behind(kind, work):
    module = kind().train()
    module.fc.eval()  # mixed flags must come back as they were
    x = torch.ones(2, 3)
    before, seed = state(module), torch.get_rng_state()
    work(Network(module, (x,)))
    assert state(module) == before
    assert torch.equal(x, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), seed)


def test_runs_in_evaluation_mode_and_a_failure_passes_through():
    module = Uncopyable().train()
    with pytest.raises(ZeroDivisionError), isolated(Network(module, (torch.ones(1, 3),))) as run:
        run[0](*run[1])
        assert not run[0].training and module.calls == 1
        raise ZeroDivisionError
    assert module.training and module.calls == 0


def test_clone_reaches_into_containers():
    x = torch.zeros(2)
    copy = clone({"a": [x, (x, 3)]})
    copy["a"][0].add_(1)
    copy["a"][1][0].add_(1)
    assert x.sum() == 0 and copy["a"][1][1] == 3


def test_batch_is_dimension_0_of_the_first_tensor():
    assert batch_size((torch.zeros(()), torch.zeros(4, 2)), {}) == 4
    assert batch_size(({"x": [torch.zeros(3)]},), {}) == 3
    assert batch_size((), {"ids": torch.zeros(5, 1)}) == 5
    assert batch_size((torch.zeros(0, 3),), {}) == 1


def test_one_line():
    assert one_line(ValueError("\n first\nsecond")) == "ValueError: first"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 999))) == 160
