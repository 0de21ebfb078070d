"""ONNX files give what torch gives, or are not written."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lamina.errors import MissingExtraError, NetworkError, RunError
from lamina.exporting import export, onnx_file, write_onnx
from lamina.forms import Edit, install
from lamina.network.source import Network

for needed in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def small() -> Network:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    return Network(net, (torch.randn(1, 6),), name="small")


TASKS = {
    "BertModel": "features", "GPT2LMHeadModel": "causal", "LlamaForCausalLM": "causal",
    "T5ForConditionalGeneration": "seq2seq", "ViTForImageClassification": "image",
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_networks_of_transformers_give_the_same_at_every_length(tmp_path: Path, name: str) -> None:
    pytest.importorskip("transformers")
    from tests.exporting.models import tiny

    from lamina.network.pretrained import described

    module, inputs = tiny(name, layers=1)
    network = replace(described(module), example_kwargs=inputs)
    assert network.task == TASKS[name]
    written = write_onnx(network, tmp_path / "net.onnx")
    assert written.error < 1e-5 and written.layers >= 4 and written.integers == 0
    ends = 1 if name.startswith("ViT") else 2
    wanted = {f"{n}[{at}]" for n in written.inputs for at in range(ends)}
    assert set(written.dynamic) == wanted
    assert written.outputs[0] in ("logits", "last_hidden_state")
    assert "relative error" in written.line() and str(tmp_path / "net.onnx") in written.line()


def test_int8_makes_every_linear_layer_an_integer_product(tmp_path: Path) -> None:
    import onnx

    network = small()
    written = write_onnx(network, tmp_path / "net.onnx", int8=True)
    kinds = [n.op_type for n in onnx.load(str(tmp_path / "net.onnx")).graph.node]
    assert written.integers == written.layers == kinds.count("MatMulInteger") == 2
    assert 1e-5 < written.error < 0.1 and "2 of 2 linear layers in integers" in written.line()
    assert isinstance(network.module, nn.Sequential)
    assert type(network.module[0]) is nn.Linear


def test_layers_of_the_form_int8_keep_their_integers_or_become_floats(tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    network = small()
    install(network.module, [Edit("0", "int8")])
    network.module.eval()
    before = [type(m) for m in network.module.modules()]
    written = write_onnx(network, tmp_path / "net.onnx")
    assert (written.integers, written.layers) == (1, 2)
    held = {
        i.name: numpy_helper.to_array(i)
        for i in onnx.load(str(tmp_path / "net.onnx")).graph.initializer
    }
    integers, _ = network.module[0].integers()  # type: ignore[union-attr,operator]
    assert any(a.dtype == "int8" and (a == integers.numpy().T).all() for a in held.values()
               if a.shape == (6, 8))  # fmt: skip
    assert [type(m) for m in network.module.modules()] == before
    assert write_onnx(network, tmp_path / "float.onnx", int8=False, tolerance=0.1).integers == 0


def test_half_precision_is_written_as_float32(tmp_path: Path) -> None:
    network = small()
    network = replace(
        network, module=network.module.bfloat16(), example_inputs=(torch.randn(1, 6).bfloat16(),)
    )
    written = write_onnx(network, tmp_path / "net.onnx")
    assert "written as float32" in written.line()
    assert next(network.module.parameters()).dtype == torch.bfloat16


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_text("older")
    with pytest.raises(NetworkError, match=r"relative error is .*--tolerance, or leave --int8 out"):
        write_onnx(small(), tmp_path / "net.onnx", int8=True, tolerance=1e-9)
    assert (tmp_path / "net.onnx").read_text() == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(NetworkError, match="cannot be exported to ONNX"):
        write_onnx(Network(Branch(), (torch.ones(2, 2),)), tmp_path / "net.onnx")
    with pytest.raises(NetworkError, match="no example inputs"):
        write_onnx(Network(nn.Linear(2, 2)), tmp_path / "net.onnx")
    with pytest.raises(NetworkError, match="an input is no tensor"):
        write_onnx(Network(nn.Linear(2, 2), (3,)), tmp_path / "net.onnx")
    with pytest.raises(RunError, match="it is a folder"):
        write_onnx(small(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_large_files_have_their_values_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Linear(64, 64)
    monkeypatch.setattr(onnx_file, "LIMIT", 4096)
    written = write_onnx(Network(net, (torch.randn(2, 64),)), tmp_path / "net.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert written.size == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert (tmp_path / "net.onnx.data").stat().st_size >= 4 * 64 * 64


def test_a_missing_extra_names_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxscript":
            raise ImportError("No module named 'onnxscript'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'lamina\[onnx\]'"):
        write_onnx(small(), tmp_path / "net.onnx")


def test_a_zoo_network_goes_from_file_to_onnx(tmp_path: Path) -> None:
    from lamina.artifact import pack
    from lamina.zoo import zoo

    network = zoo("lenet-5")
    edit = Edit("conv2", "tucker", {"outputs": 12, "inputs": 10})
    if not any(name == "conv2" for name, _ in network.module.named_modules()):
        name = next(n for n, m in network.module.named_modules() if isinstance(m, nn.Conv2d))
        edit = Edit(name, "tucker", {"outputs": 3, "inputs": 1})
    install(network.module, [edit])
    (tmp_path / "net.lamina").write_bytes(pack(network.module, (edit,), network.source, {}))
    said = export(tmp_path / "net.lamina", tmp_path / "net.onnx", "onnx")
    assert "checked  in onnxruntime" in said and (tmp_path / "net.onnx").stat().st_size > 1000
