"""Recovery of `transformers` models: dicts of tensors, masks, tied weights, bfloat16."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.train.small import to_grid
from torch import nn

from lamina.artifact import pack
from lamina.data import Data
from lamina.forms import Edit, install
from lamina.measure.loss import pooled
from lamina.network.source import Network
from lamina.plan.apply import Edited, copy_module
from lamina.train import Recovery, recover
from lamina.train.distill import Hidden, distillation_loss

transformers = pytest.importorskip("transformers")

TOKENS, WIDTH, TEXTS = 40, 16, 24
SIZES: dict[str, Any] = {
    "vocab_size": TOKENS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def texts(padding: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of tokens of two lengths; what is behind the mask is `padding`."""
    g = torch.Generator().manual_seed(2)
    found = []
    for _ in range(TEXTS // 8):
        ids = torch.randint(1, TOKENS, (8, 10), generator=g)
        mask = torch.ones_like(ids)
        mask[4:, 6:] = 0
        found.append({"input_ids": ids.where(mask == 1, padding), "attention_mask": mask})
    return found


def edit(network: Network, step: float) -> Edited:
    module = copy_module(network.module)
    named = [(n, p) for n, p in network.module.named_parameters() if p.dim() > 1]
    edits = tuple(
        Edit(n, "values", values=to_grid(p, step * float(p.detach().std()))) for n, p in named
    )
    install(module, edits)
    floats = {n: p.detach().clone() for n, p in named}
    return Edited(replace(network, module=module), edits, floats)


def encoder(loss: str = "embedding") -> Network:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)
    with torch.no_grad():  # as after a training: of zeros and ones, a file takes no bytes
        for p in model.parameters():
            if p.dim() < 2:
                p.add_(0.1 * torch.randn_like(p))
    return Network(model.eval(), example_kwargs=texts()[0], loss=loss)


def cosine(network: Network, edited: Edited) -> float:
    found = []
    for batch in texts():
        with torch.no_grad():
            a, b = (
                pooled(m(**batch).last_hidden_state, batch["attention_mask"])
                for m in (network.module, edited.model)
            )
        found.append((a * b).sum(1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("parts", ["all", "scales"])
def test_an_encoder_learns_its_embeddings_again(parts: str) -> None:
    network = encoder()
    edited = edit(network, 1.2)
    settings = Recovery(epochs=25, lr=3e-3, rate=False, parts=parts)
    made = recover(network, edited, Data(train=texts()), settings)
    before, after = cosine(network, edited), cosine(network, made.edited)
    assert 1 - after < (0.3 if parts == "all" else 0.9) * (1 - before)


def test_full_distillation_comes_down_to_a_size() -> None:
    network = encoder()
    edited = edit(network, 0.3)
    limit = int(0.85 * len(pack(edited.model, edited.edits, "module", {})))
    settings = Recovery(epochs=40, lr=3e-3, half=True, clip=1.0, accumulate=2)
    made = recover(network, edited, Data(train=texts()), settings, limit=limit)
    assert len(pack(made.edited.model, made.edited.edits, "module", {})) <= limit
    assert cosine(network, made.edited) > 0.9


@pytest.mark.parametrize("loss", ["embedding", "features"])
def test_padding_does_not_count(loss: str) -> None:
    network = encoder(loss)
    edited = edit(network, 0.8)
    settings = Recovery(epochs=2, rate=False, hidden=0.5)
    made = [recover(network, edited, Data(train=texts(p)), settings) for p in (0, 7)]
    assert [r["loss"] for r in made[0].history] == pytest.approx(
        [r["loss"] for r in made[1].history], rel=1e-4
    )


def test_padded_outputs_are_left_out_of_every_loss() -> None:
    g = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(3, 5, 4, generator=g) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    kept = mask.bool()
    wild = ours.where(kept[..., None], 1e6)
    for kind in ("features", "embedding", "logits"):
        found = [
            distillation_loss(x, theirs, None, kind, mask=mask) for x in (ours, wild)
        ]  # fmt: skip
        assert torch.equal(*found), kind
    whole = distillation_loss(ours, theirs, None, "features", mask=mask)
    expected = (ours[kept] - theirs[kept]).square().mean() / theirs[kept].square().mean()
    torch.testing.assert_close(whole, expected)
    layer, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    hidden = Hidden(layer, other)
    layer(theirs), other(ours)
    masked = hidden.loss(mask)
    a, b = other[0](ours)[kept], layer[0](theirs)[kept]
    torch.testing.assert_close(masked, (a - b).square().mean() / b.square().mean())


def causal() -> Network:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=16, use_cache=False,
        initializer_range=0.5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    return Network(model, example_kwargs=texts()[0], loss="logits")


def divergence(network: Network, edited: Edited) -> float:
    total = 0.0
    for batch in texts():
        with torch.no_grad():
            a, b = (m(**batch).logits.float().log_softmax(-1) for m in
                    (network.module, edited.model))  # fmt: skip
        kept = batch["attention_mask"].bool()
        total += float((a.exp() * (a - b)).sum(-1)[kept].mean())
    return total


@pytest.mark.parametrize("labelled", [False, True])
def test_a_language_model_keeps_its_tie(labelled: bool) -> None:
    network = causal()
    edited = edit(network, 0.9)
    batches = texts()
    if labelled:  # as transformers has them: the tokens themselves, -100 where none counts
        for batch in batches:
            batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    settings = Recovery(epochs=15, lr=3e-3, rate=False, distill=1.0 if not labelled else 0.7)
    made = recover(network, edited, Data(train=batches), settings).edited
    model: Any = made.model
    assert model.lm_head.weight is model.transformer.wte.weight
    if not labelled:
        assert divergence(network, made) < 0.8 * divergence(network, edited)
    assert len([e for e in made.edits if e.path.endswith(("wte.weight", "lm_head.weight"))]) == 1


def test_a_model_in_bfloat16_stays_in_it() -> None:
    network = causal()
    network = replace(network, module=copy.deepcopy(network.module).bfloat16())
    edited = edit(network, 0.9)
    made = recover(
        network, edited, Data(train=texts()), Recovery(epochs=15, lr=3e-3, rate=False, half=True)
    ).edited
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    assert divergence(network, made) < 0.7 * divergence(network, edited)
