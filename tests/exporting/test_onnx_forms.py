"""Every form there is goes through the ONNX check; what cannot be exported is listed with why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lamina.forms import BUILDERS, Edit, index_of, install
from lamina.network.source import Network

for needed in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed)

from lamina.exporting import write_onnx  # noqa: E402

REFUSED: dict[str, str] = {}  # form: why no ONNX file can hold it; none so far

LINEAR = [
    Edit("a", "low_rank", {"folds": 2, "rank": 3}),
    Edit("b", "gathered", {"channels": 12}),
    Edit("c", "shuffled", {"groups": 4}),
    Edit("d", "int8"),
    Edit("e", "input_quantized", {"bits": 4, "zero": -7, "levels": 15}),
    Edit("f", "biased"),
    Edit("h", "tie"),
    Edit("i", "identity"),
    Edit("j", "resized", {"outputs": 12}),
    Edit("k", "narrow", {"inputs": 12, "outputs": 16}),
    Edit("l", "bf16"),
]
CONV = [
    Edit("0", "tucker", {"outputs": 3, "inputs": 2}),
    Edit("2", "low_rank", {"folds": 1, "rank": 3}),
    Edit("3", "shuffled", {"groups": 2}),
    Edit("4", "gathered", {"channels": 5, "rank": 2}),
    Edit("5", "merged", {"inputs": 8, "outputs": 6, "kernel": 3, "padding": 1, "activation": 1}),
    Edit("6", "narrow", {"inputs": 6, "outputs": 4}),
    Edit("", "layout", {"channels_last": 1}),
]


class Chain(nn.Sequential):
    """Linear layers by letters, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcdefghijkl":
            layer = nn.ReLU() if name == "i" else nn.Linear(16, 16, bias=name != "f")
            self.add_module(name, layer)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(),
    )  # fmt: skip


def edited(module: nn.Module, edits: list[Edit]) -> nn.Module:
    """Put edits in, and give what they leave empty values of some kind."""
    module.eval()
    for edit in edits:
        if edit.form == "tie":
            edit = Edit(edit.path, "tie", {"with": index_of(module, "g")})
        install(module, [edit])
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        with torch.no_grad():
            if name.endswith("index"):
                tensor.copy_(torch.randperm(int(tensor.numel())))
            elif name.endswith("input_step"):
                tensor.fill_(0.2)
            elif tensor.is_floating_point() and "var" not in name:
                tensor.copy_(torch.randn(tensor.shape) / max(tensor.shape[-1:] or (1,)) ** 0.5)
    return module


def test_every_form_is_tried() -> None:
    assert {e.form for e in (*LINEAR, *CONV)} | set(REFUSED) == set(BUILDERS) | {"tie"}


def test_forms_of_linear_layers_give_the_same_in_onnxruntime(tmp_path: Path) -> None:
    module = edited(Chain(), LINEAR)
    written = write_onnx(Network(module, (torch.randn(3, 5, 16),)), tmp_path / "net.onnx")
    assert written.integers == 1 and written.error < 0.05 and written.tolerance == 0.3
    assert "last bit decides" in written.note and "samples differed" in written.note
    assert written.dynamic == ("input[0]",)


def test_forms_of_convolutions_give_the_same_in_onnxruntime(tmp_path: Path) -> None:
    module = edited(conv_net(), CONV)
    written = write_onnx(Network(module, (torch.randn(1, 3, 9, 9),)), tmp_path / "net.onnx")
    assert written.error < 1e-5 and written.integers == 0
    assert written.dynamic == ("input[0]",)
