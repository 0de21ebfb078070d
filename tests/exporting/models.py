"""Tiny networks of transformers, and `.lamina` files of them made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.artifact import pack
from lamina.forms import Edit, Grid, index_of, install
from lamina.network.pretrained import source_of

STEP = 0.01
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOKENS = torch.arange(24).reshape(2, 12) + 5


def tiny(name: str, layers: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a random network of a class of transformers, and inputs for it; T5 has one layer."""
    import transformers as t

    shape = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    wide = {**shape, "intermediate_size": 64}
    text = {**wide, "vocab_size": 100, "max_position_embeddings": 32}
    ids = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    torch.manual_seed(0)
    if name == "GPT2LMHeadModel":
        sizes = {"n_layer": layers, "n_embd": 32, "n_head": 2, "vocab_size": 100, "n_positions": 32}
        module = t.GPT2LMHeadModel(t.GPT2Config(**sizes, **SPECIAL))
    elif name == "LlamaForCausalLM":
        module = t.LlamaForCausalLM(t.LlamaConfig(**text, **SPECIAL))
    elif name == "T5ForConditionalGeneration":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
        config = t.T5Config(**sizes, vocab_size=100, decoder_start_token_id=0, **SPECIAL)
        module = t.T5ForConditionalGeneration(config)
        ids = {**ids, "decoder_input_ids": TOKENS[:, :5]}
    elif name == "ViTForImageClassification":
        config = t.ViTConfig(**wide, image_size=16, patch_size=4)
        module = t.ViTForImageClassification(config)
        ids = {"pixel_values": torch.randn(2, 3, 16, 16)}
    elif name == "MixtralForCausalLM":
        config = t.MixtralConfig(**text, **SPECIAL, num_key_value_heads=2, num_local_experts=2)
        module = t.MixtralForCausalLM(config)
    else:
        module = getattr(t, name)(t.BertConfig(**text))
    return module.eval(), ids


def write_file(path: Path, module: Any, edits: tuple[Edit, ...] = ()) -> nn.Module:
    """Put structural edits and a coarse grid into a network; write its `.lamina` file; return it.

    A tie's `with` is given as the other layer's path.
    """
    source = source_of(module)
    made: list[Edit] = []
    for edit in edits:
        if edit.form == "tie":
            edit = Edit(edit.path, "tie", {"with": index_of(module, str(edit.settings["with"]))})
        install(module, [edit])
        made.append(edit)
    seen = set()
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2 and id(parameter) not in seen:
            seen.add(id(parameter))
            values = torch.randn(parameter.shape) * 0.1
            symbols = torch.round(values / STEP).clamp(-127, 127).to(torch.int32)
            made.append(Edit(name, "values", {}, Grid(symbols, STEP, dtype=parameter.dtype)))
    install(module, [e for e in made if e.form == "values"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(module, tuple(made), source, {}))
    return module
