"""Running a network without its values: to the bit what it gives when all of it is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.hf_folders import tokens
from torch import nn

from lamina.errors import DataError, NetworkError
from lamina.measure.forward import batches
from lamina.network.lazy import open_lazily
from lamina.network.pretrained import open_folder
from lamina.network.source import main_output
from lamina.streaming.blocks import enter, find_blocks, leave, run_block, whole

Folder = Callable[[str], Path]


@pytest.mark.parametrize(
    ("kind", "path"),
    [("llama", "model.layers"), ("bert", "encoder.layer"), ("gpt2", "transformer.h")],
)
@pytest.mark.parametrize("pad", [False, True])
def test_block_by_block_is_the_forward_pass(tiny: Folder, kind: str, path: str, pad: bool) -> None:
    lazy, module = open_lazily(tiny(kind)), open_folder(tiny(kind)).module
    root, data = lazy.network.module, tokens(2, 0, pad)
    stack, given = find_blocks(root), list(batches(nn.Linear(1, 1), data))
    assert stack.path == path and len(stack.blocks) == 3
    passings, tupled = enter(root, stack, given, lazy.tensor), False
    for i, block in enumerate(stack.blocks):
        with whole(block, stack.prefix(i), lazy.tensor), torch.no_grad():
            for j, passing in enumerate(passings):
                output, tupled = run_block(block, passing)
                passings[j] = passing.with_hidden(output)
        assert all(p.is_meta for p in block.parameters())
    ends: list[Any] = []
    handle = root.register_forward_hook(lambda module, args, output: ends.append(output))
    leave(root, stack, given, [p.hidden for p in passings], tupled, lazy.tensor)
    handle.remove()
    assert all(p.is_meta for p in root.parameters())
    for batch, end in zip(data, ends, strict=True):
        with torch.no_grad():
            assert torch.equal(main_output(end), main_output(module(**batch)))
    assert all("forward" not in vars(block) for block in stack.blocks)


def test_a_batch_the_network_does_not_take_is_an_error(tiny: Folder) -> None:
    lazy = open_lazily(tiny("bert"))
    stack = find_blocks(lazy.network.module)
    given = list(batches(nn.Linear(1, 1), [{"nonsense": torch.zeros(2, 3)}]))
    with pytest.raises(DataError, match="does not take this batch"):
        enter(lazy.network.module, stack, given, lazy.tensor)
    assert all(p.is_meta for p in lazy.network.module.parameters())


def test_the_longest_list_of_equal_blocks_is_taken() -> None:
    def block(width: int) -> nn.Module:
        return nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(width, width)] * 9)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few = nn.ModuleList([block(5), block(5)])
            self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.ReLU(), nn.ReLU()])
            self.many = nn.ModuleList([block(2), block(2), block(2)])

    assert find_blocks(Net()).path == "many"
    with pytest.raises(NetworkError, match="no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))
    both = Net()
    both.config = SimpleNamespace(is_encoder_decoder=True)  # type: ignore[assignment]
    with pytest.raises(NetworkError, match="an encoder and a decoder"):
        find_blocks(both)
