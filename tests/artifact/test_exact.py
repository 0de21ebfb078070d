"""Exact values in the shorter form: sizes are told truly, and networks come back bit for bit."""

from __future__ import annotations

import pytest
import torch
from tests.forms.test_affine import KINDS, random_affine, same, through, weights
from torch import nn

import lamina
from lamina.artifact import pack, records, unpack
from lamina.artifact.exact import exact, exact_bytes
from lamina.forms import Affine, Edit, Plain
from lamina.methods.keep import hold


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_a_quantized_file_takes_less_than_there(kind):
    tensor, before = through(kind, weights(80, 512))
    values = exact(tensor)
    record = records.encode(values)
    assert isinstance(values, Affine) and len(record) < 0.96 * before
    assert abs(exact_bytes(values) / len(record) - 1) < 0.005
    held, size = hold(tensor)
    assert isinstance(held, Affine) and size == exact_bytes(values)


def test_what_is_shorter_plain_stays_plain():
    for tensor in (
        torch.randn(64, 64),
        torch.zeros(64, 64),
        torch.randn(64),
        torch.ones(2, 3).int(),
    ):
        values = exact(tensor)
        assert isinstance(values, Plain) and torch.equal(values.tensor, tensor)
        assert exact_bytes(values) == records.values_bytes(tensor)


def test_files_without_such_grids_are_of_the_version_before():
    net = nn.Linear(64, 12)
    assert b'\\"lamina\\":2' in pack(net, (), "module", {})
    grid = random_affine(0, torch.float16, True, 32, 16)
    file = pack(net, (Edit("weight", "values", values=grid),), "module", {})
    assert b'\\"lamina\\":3' in file
    assert unpack(file).records["weight"].form == "affine"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_tiny_llama_out_of_a_quantized_file(kind, tmp_path):
    """Lossless: smaller than the quantized tensors, every bit back, and the report says so."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=160, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    before = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                values, size = through(kind, parameter.numpy())
                parameter.copy_(values)
            before += size if parameter.dim() == 2 else 4 * parameter.numel()
    tokens = torch.arange(16).reshape(1, 16)
    result = lamina.compress(model, lossless=True, example_inputs=(tokens,))
    path = tmp_path / "net.lamina"
    result.save(path)
    package = lamina.artifact.read(path)
    assert path.stat().st_size < before
    forms = [record.form for record in package.records.values() if len(record.shape) == 2]
    assert len(forms) == 15 and set(forms) == {"affine"}
    state = model.state_dict()
    for name in package.records:
        assert same(package.dense(name), state[name]), name
    rows = {row["form"] for row in result.report.facts["ledger"] if row["site"]}
    assert "affine" in rows
    assert "affine" in result.report.markdown() or "affine" in result.report.text()
    twin = transformers.LlamaForCausalLM(config).eval()
    back = lamina.load(path, skeleton=twin)
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, model(tokens).logits)
