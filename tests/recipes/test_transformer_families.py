"""int4-2:4 on tiny random models of `transformers`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lamina.artifact import restore, unpack
from lamina.data import Data
from lamina.measure.stats import Stats
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.plan import Budget
from lamina.recipes.transformer import IntTwoFour, backbone
from lamina.stages import Way, packed
from lamina.train.quantizing import Tuning

transformers = pytest.importorskip("transformers")
QUICK = IntTwoFour((("sparse", 1.0), ("both", 1.0)), tuning=Tuning(lr=1e-3, range_lr=1e-2))


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt() -> Any:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        if name == "vit":
            x = {"pixel_values": torch.randn(8, 3, 8, 8, generator=g)}
        else:
            ids = torch.randint(40, (8, 10), generator=g)
            x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        labels = x["input_ids"] if name == "gpt" else torch.randint(3, (8,), generator=g)
        found.append({**x, "labels": labels})
    return found


@pytest.mark.parametrize(
    ("name", "layers", "ranges"), [("bert", 12, 8), ("gpt", 8, 8), ("vit", 12, 8)]
)
def test_families(name: str, layers: int, ranges: int) -> None:
    torch.manual_seed(0)
    module = {"bert": bert, "gpt": gpt, "vit": vit}[name]().eval()
    data = batches(name)
    example = {k: v[:2] for k, v in data[0].items() if k != "labels"}
    network = Network(module, (), example, loss="logits")
    sites = discover(network)
    assert len(backbone(sites)) == layers
    way = Way(network, Data(train=data, calibration=data[:1]), Budget.parse("100%"))
    followed = QUICK.follow(way, sites, Stats())
    (note,) = [n for n in followed.notes if n.startswith("Inputs of")]
    assert note.startswith(
        f"Inputs of {layers} of {layers} layers are rounded to 4 bits, in {ranges}"
    )
    assert any("16.0x for the values" in n for n in followed.notes)
    skeleton = copy.deepcopy(module)
    for p in skeleton.parameters():
        torch.nn.init.normal_(p)
    loaded = restore(unpack(packed(followed.final, followed.plan)), skeleton).eval()
    with torch.no_grad():
        want = followed.final.model.eval()(**example).logits
        assert torch.equal(loaded(**example).logits, want)
        assert not torch.equal(module(**example).logits, want)
    if name == "gpt":
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
