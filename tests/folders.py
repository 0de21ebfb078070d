"""Tiny Hugging Face folders: random networks of a few families, and a trained tokenizer."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

TEXT = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 8, "num_labels": 3,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", TEXT),
    "classifier": ("BertForSequenceClassification", {**TEXT, "num_labels": 2}),
    "gpt2": ("GPT2LMHeadModel", {
        "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
        "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaForCausalLM", {
        **TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True, "dtype": "bfloat16"}),
    "t5": ("T5ForConditionalGeneration", {
        "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0}),
    "vit": ("ViTForImageClassification", IMAGE),
    "wav2vec2": ("Wav2Vec2ForCTC", {
        "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "conv_dim": [16, 16], "conv_kernel": [10, 8],
        "conv_stride": [8, 8], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4}),
}  # fmt: skip
TEN = "the a small large film plot actor scene was is"
WORDS = [*TEN.split(" "), "not", "very", "quite", "good", "bad", "slow", "fast"]


def save_folder(name: str, folder: Path, *, shard: str = "5GB", **more: Any) -> Any:
    """Save a tiny network of a family, and return it."""
    import transformers

    kind_name, settings = KINDS[name]
    kind = getattr(transformers, kind_name)
    torch.manual_seed(0)
    settings = {**settings, **more}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        module = kind(kind.config_class.from_dict(dict(settings)))
        module = module.to(getattr(torch, settings.get("dtype", "float32"))).eval()
        module.save_pretrained(folder, max_shard_size=shard)
    return module


def write_text(path: Path, lines: int = 200) -> Path:
    """Write lines of a few words, always the same."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for _ in range(lines):
        count = int(torch.randint(3, 12, (1,), generator=draw))
        picks = torch.randint(0, len(WORDS), (count,), generator=draw).tolist()
        made.append(" ".join(WORDS[i] for i in picks))
    path.write_text("\n".join(made) + "\n", encoding="utf-8")
    return path


def save_tokenizer(folder: Path) -> None:
    """Train a word tokenizer of fewer than 96 tokens, and save it beside a network."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    made.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=special))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
