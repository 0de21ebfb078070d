"""Tiny folders of three families, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")


def make_folder(kind: str, where: Path) -> None:
    """Save a tiny random model of a family."""
    torch.manual_seed(0)
    if kind == "llama":  # tied, in several shards
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=120, tie_word_embeddings=True, bos_token_id=1,
            eos_token_id=2, dtype="bfloat16",
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    elif kind == "bert":  # an encoder, with biases
        config = transformers.BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            vocab_size=120, max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.BertModel(config)
    else:  # weights stored transposed, tied
        config = transformers.GPT2Config(
            n_embd=32, n_layer=3, n_head=4, vocab_size=120, n_positions=64, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(where, max_shard_size="20KB" if kind == "llama" else "1GB")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family; nobody may write into it."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "model"
            make_folder(kind, made[kind])
        return made[kind]

    return folder


@pytest.fixture
def own(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a family's folder that a test may damage."""

    def folder(kind: str) -> Path:
        shutil.copytree(tiny(kind), tmp_path / "own")
        return tmp_path / "own"

    return folder


def tokens(batches: int, seed: int, pad: bool = False) -> list[dict[str, torch.Tensor]]:
    """Return batches of random tokens, the last of them padding where asked."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        ids = torch.randint(3, 120, (4, 16), generator=draw)
        mask = torch.ones_like(ids)
        if pad:
            mask[:, 12:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found
