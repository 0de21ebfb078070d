"""Text as batches: windows of a stream for language models, lines for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lamina.data.loaders import Data, TensorLoader
from lamina.errors import DataError, MissingExtraError
from lamina.network.source import Network

WINDOW, LINE = 128, 64  # tokens of a sample, at most
BATCH = 16
PARTS = (0.8, 0.1)  # of the text: train, validation; the rest is the test split
IGNORED = -100


def load_text(path: Path, network: Network) -> Data:
    """Open a text file, cut into tokens by the tokenizer of a network's folder.

    Args:
        path: UTF-8 text; for models that read sentences, one a line.
        network: opened from a Hugging Face folder.

    Returns:
        Dicts of `input_ids` and `attention_mask`; causal models have their tokens as labels. The
        splits are consecutive parts of the file: 80, 10 and 10 %.

    Raises:
        DataError: the file is missing, is no text, or is too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("cannot read text", str(path), str(error), "give UTF-8 text") from None
    tokenizer = tokenizer_of(network)
    if network.task == "causal":
        splits = _windows(tokenizer, text)
    else:
        splits = _lines(tokenizer, [line for line in text.splitlines() if line.strip()])
    if any(len(next(iter(s.values()))) == 0 for s in splits):
        raise DataError("too little text", str(path), "a split would be empty", "give more of it")
    loaders = [_loader(s, network.task == "causal", i == 0) for i, s in enumerate(splits)]
    train, validation, test = loaders
    return Data(train=train, calibration=train.head(1000), validation=validation, test=test,
                name=path.name)  # fmt: skip


def tokenizer_of(network: Network) -> Any:
    """Return the tokenizer that lies in a network's folder.

    Raises:
        DataError: the network was not opened from a folder, or it has no tokenizer.
    """
    if not network.folder:
        raise DataError(
            "text needs a tokenizer", network.name, "only a Hugging Face folder brings one",
            "tokenise it in a file.py:function that yields dicts of tensors",
        )  # fmt: skip
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtraError(
            "transformers is not installed", "", "text needs its tokenizers",
            "pip install 'lamina[hf]'",
        ) from None  # fmt: skip
    try:
        return AutoTokenizer.from_pretrained(network.folder, local_files_only=True)
    except Exception as error:  # whatever transformers may raise
        raise DataError(
            "the folder has no tokenizer", network.folder, str(error).splitlines()[0]
        ) from None


def _windows(tokenizer: Any, text: str) -> list[dict[str, torch.Tensor]]:
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    whole = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return _cut({"input_ids": whole, "attention_mask": torch.ones_like(whole)})


def _lines(tokenizer: Any, lines: list[str]) -> list[dict[str, torch.Tensor]]:
    if not lines:
        raise DataError("too little text", "", "it has no line", "give more of it")
    given = tokenizer(lines, truncation=True, max_length=LINE, padding=True, return_tensors="pt")
    return _cut({k: given[k] for k in ("input_ids", "attention_mask")})


def _cut(whole: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    n = len(whole["input_ids"])
    ends = [int(n * PARTS[0]), int(n * (PARTS[0] + PARTS[1])), n]
    return [
        {k: v[a:b] for k, v in whole.items()} for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _loader(x: dict[str, torch.Tensor], causal: bool, train: bool) -> TensorLoader:
    y = x["input_ids"].masked_fill(x["attention_mask"] == 0, IGNORED) if causal else None
    return TensorLoader(x, y, BATCH, shuffle=train)
