"""Text as batches: windows of a stream for language models, lines for everything else."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamina.data.loaders import Data, TensorLoader
from lamina.errors import DataError, MissingExtraError
from lamina.network.source import Network

WINDOW, LINE = 128, 64  # tokens of a sample, unless told otherwise
BATCH = 16
PARTS = (0.8, 0.1)  # of the text: train, validation; the rest is the test split
IGNORED = -100
MANY = 1_000_000  # tokenizers without a limit say a huge number
Inputs = dict[str, Tensor]


def load_text(path: Path, network: Network, tokens: int | None = None) -> Data:
    """Open a text file, cut into tokens by the tokenizer of a network's folder.

    Causal models get windows of the whole text, one after another; all others lines, each a
    sample, shortened where they are too long, and padded. Encoder-decoders are to repeat the line.

    Args:
        path: UTF-8 text; for models that read sentences, one a line.
        network: opened from a Hugging Face folder.
        tokens: of a window, or at most of a line; default: 128, or 64; never more than the model
            takes.

    Returns:
        Dicts of `input_ids` and `attention_mask`; causal models have their tokens as labels. The
        splits are consecutive parts of the file: 80, 10 and 10 %.

    Raises:
        DataError: the file is missing, is no text, or is too short; the network reads no text, or
            its folder has no tokenizer that fits it.
    """
    text = read_text(path)
    reader = Reader.of(network, tokens, str(path))
    if network.task == "causal":
        splits = [_whole(part) for part in consecutive(reader.windows(text))]
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise DataError("too little text", str(path), "it has no line", "give more of it")
        splits = consecutive(reader.lines(lines))
    if any(len(next(iter(s.values()))) == 0 for s in splits):
        unit = f"windows of {reader.tokens} tokens" if network.task == "causal" else "lines"
        raise DataError(
            "too little text", str(path), f"it has fewer than 10 {unit}", "give more of it"
        )
    return as_splits(dict(zip(("train", "validation", "test"), splits, strict=True)), path.name)


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text.

    Raises:
        DataError: it cannot be read, is no text, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is no UTF-8"
        raise DataError("cannot read text", str(path), why, "give UTF-8 text") from None
    except OSError as error:
        raise DataError("cannot read text", str(path), error.strerror or str(error)) from None
    if "\0" in text[:100_000]:
        raise DataError("cannot read text", str(path), "it has zero bytes", "give UTF-8 text")
    if not text.strip():
        raise DataError("too little text", str(path), "it is empty", "give more of it")
    return text


@dataclass(frozen=True)
class Reader:
    """A tokenizer and what of its output a network takes.

    Args:
        tokenizer: of `transformers`.
        network: opened from a Hugging Face folder.
        tokens: of a sample, at most.
        where: what is read, for errors.
    """

    tokenizer: Any
    network: Network
    tokens: int
    where: str

    @classmethod
    def of(cls, network: Network, tokens: int | None, where: str) -> Reader:
        """Open the tokenizer in a network's folder.

        Raises:
            DataError: there is none, or the network reads no text.
        """
        if network.task in ("image", "audio"):
            raise DataError(
                "the network reads no text", network.name, f"it is an {network.task} model",
                "give images:FOLDER, file.npz or file.py:function",
            )  # fmt: skip
        tokenizer = tokenizer_of(network)
        most = _most_tokens(network.module, tokenizer)
        if tokens is None:
            tokens = min(WINDOW if network.task == "causal" else LINE, most)
        if not 2 <= tokens <= most:
            raise DataError("bad number of tokens", str(tokens), f"the network takes 2 to {most}")
        return cls(tokenizer, network, tokens, where)

    def windows(self, text: str | Sequence[str]) -> Inputs:
        """Return a text, or several with the end token between them, as windows `[n, tokens]`."""
        if isinstance(text, str):
            ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        else:
            end = self.tokenizer.eos_token_id
            found = self.tokenizer(list(text), verbose=False)["input_ids"] if text else []
            ids = [i for one in found for i in (*one, *([] if end is None else [end]))]
        whole = torch.tensor(ids[: len(ids) // self.tokens * self.tokens], dtype=torch.int64)
        whole = whole.reshape(-1, self.tokens)
        self._must_fit(whole)
        return {"input_ids": whole, "attention_mask": torch.ones_like(whole)}

    def lines(self, lines: Sequence[str], pairs: Sequence[str] | None = None) -> Inputs:
        """Return texts, or pairs of texts, padded on the right `[n, longest]`; decoders get the
        same tokens, one place later."""
        given = self._padded(lines, pairs)
        if self.network.task == "seq2seq":
            given["decoder_input_ids"] = self._later(given["input_ids"])
        return given

    def answers(self, lines: Sequence[str], wanted: Sequence[str]) -> tuple[Inputs, Tensor]:
        """Return the inputs of an encoder-decoder and the tokens it is to write."""
        given, made = self._padded(lines), self._padded(wanted)
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, IGNORED)
        return {**given, "decoder_input_ids": self._later(made["input_ids"])}, labels

    def _padded(self, lines: Sequence[str], pairs: Sequence[str] | None = None) -> Inputs:
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        if self.tokenizer.pad_token is None:
            raise DataError("the tokenizer has no padding", self.network.folder)
        takes = inspect.signature(self.network.module.forward).parameters
        typed = pairs is not None and "token_type_ids" in takes
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        given = self.tokenizer(
            list(lines), None if pairs is None else list(pairs), truncation=True,
            max_length=self.tokens, padding=True, return_tensors="pt", return_token_type_ids=typed,
        )  # fmt: skip
        kept = {"input_ids", "attention_mask"} | ({"token_type_ids"} if typed else set())
        self._must_fit(given["input_ids"])
        return {k: given[k] for k in sorted(kept) if k in given}

    def _later(self, ids: Tensor) -> Tensor:
        config: Any = self.network.module.config
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(config, "pad_token_id", None) or 0
        return torch.cat([torch.full_like(ids[:, :1], int(start)), ids[:, :-1]], 1)

    def _must_fit(self, ids: Tensor) -> None:
        module: Any = self.network.module
        rows = module.get_input_embeddings()
        size = getattr(rows, "num_embeddings", None)
        if isinstance(size, int) and ids.numel() and int(ids.max()) >= size:
            raise DataError(
                "the tokenizer does not fit the network", self.network.folder,
                f"it gives token {int(ids.max())}, the network knows {size}",
                "put the network's own tokenizer in its folder",
            )  # fmt: skip


def tokenizer_of(network: Network) -> Any:
    """Return the tokenizer that lies in a network's folder.

    Raises:
        DataError: the network was not opened from a folder, or it has no tokenizer.
        MissingExtraError: `transformers` is not installed.
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
    from lamina.network.skeletons import offline

    path = Path(network.folder)
    more = {"gguf_file": path.name} if path.is_file() else {}
    try:
        with offline():
            return AutoTokenizer.from_pretrained(
                str(path.parent if more else path), local_files_only=True, **more
            )
    except Exception as error:  # whatever transformers may raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(
            "the folder has no tokenizer", network.folder, lines[0][:160],
            "put tokenizer.json in it",
        ) from None  # fmt: skip


def as_splits(
    splits: Mapping[str, Inputs], name: str, labels: Mapping[str, Tensor] | None = None,
    classes: int | None = None,
) -> Data:  # fmt: skip
    """Make a `Data` of inputs by split; windows without padding have their tokens as labels."""
    loaders: dict[str, TensorLoader] = {}
    for split, given in splits.items():
        y = (labels or {}).get(split)
        loaders[split] = TensorLoader(
            given, y if labels is not None else given.pop("labels", None), BATCH,
            shuffle=split == "train", prepare=_trim,  # type: ignore[arg-type]
        )  # fmt: skip
    if "train" in loaders:
        loaders["calibration"] = loaders["train"].head(1000)
    return Data(**loaders, name=name, classes=classes)


def consecutive(whole: Inputs) -> list[Inputs]:
    """Return three consecutive parts: 80, 10 and 10 % of the samples."""
    n = len(whole["input_ids"])
    ends = [int(n * PARTS[0]), int(n * (PARTS[0] + PARTS[1])), n]
    return [
        {k: v[a:b] for k, v in whole.items()} for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _whole(part: Inputs) -> Inputs:
    return {**part, "labels": part["input_ids"]}


def _trim(batch: Inputs) -> Inputs:
    """Cut the columns in which every sample of a batch is padding."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    width = mask.shape[1]
    longest = max(1, int(mask.sum(1).max()))
    same = batch.get("decoder_input_ids", mask).shape[1] == width
    names = [n for n, v in batch.items() if same or n != "decoder_input_ids"]
    return {n: v[:, :longest] if n in names else v for n, v in batch.items()}


def _most_tokens(module: nn.Module, tokenizer: Any) -> int:
    """Return how many tokens a network takes at most."""
    config: Any = module.config
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits = [n for n in found if isinstance(n, int) and n > 0]
    for name, part in module.named_modules():
        if "position" in name and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            limits.append(part.num_embeddings - part.padding_idx - 1)  # as RoBERTa counts
    said = getattr(tokenizer, "model_max_length", None)
    if isinstance(said, int) and 1 < said < MANY:
        limits.append(said)
    return min(limits, default=MANY)
