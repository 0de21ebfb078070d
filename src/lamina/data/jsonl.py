"""JSON lines as batches: texts, pairs of texts, or a text and its answer; labels, if any."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.data.loaders import Data
from lamina.data.text import Inputs, Reader, as_splits, read_text
from lamina.errors import DataError
from lamina.network.source import Network

TEXTS = ("text", "sentence", "sentence1", "source", "input")
SECONDS = {"sentence1": "sentence2", "source": "target", "input": "target"}
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "test": "test"}  # fmt: skip
Row = Mapping[str, Any]


def load_jsonl(path: Path, network: Network, tokens: int | None = None) -> Data:
    """Open a file with one JSON object a line, cut into tokens by the tokenizer of a folder.

    A line holds `text`, or `sentence1` and `sentence2`, or for encoder-decoders `source` and
    `target`. It may hold `label`, a whole number, a number or a text: texts are numbered as the
    network's own configuration names them, else in the order of the alphabet. It may hold `split`
    (`train`, `validation`, `test`); without it, 80, 10 and 10 % are drawn from a fixed seed. Causal
    models get the texts one after another, with the end token between them.

    Args:
        path: UTF-8, one object a line; empty lines are left out.
        network: opened from a Hugging Face folder.
        tokens: as in `load_text`.

    Raises:
        DataError: a line is no such object (it is named), the lines differ in their fields, there
            are too few, or the network and its tokenizer do not take them.
    """
    rows = _read(path)
    first = next((name for name in TEXTS if name in rows[0]), "")
    if not first:
        raise DataError(
            "no text", f"{path} line 1", f"it has {', '.join(list(rows[0])[:6]) or 'nothing'}",
            "name it text, sentence1 and sentence2, or source and target",
        )  # fmt: skip
    second = SECONDS.get(first, "") if SECONDS.get(first, "") in rows[0] else ""
    for name in filter(None, (first, second)):
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get(name), str):
                raise DataError(
                    "a text is missing", f"{path} line {number}", f"{name!r} is no text"
                )
    reader = Reader.of(network, tokens, str(path))
    parts = _parts(rows, path)
    if network.task == "causal":
        return as_splits(_streams(reader, rows, parts, first), path.name)
    firsts = [str(row[first]) for row in rows]
    seconds = [str(row[second]) for row in rows] if second else None
    labels, classes = _labels(rows, network, path)
    if seconds is not None and network.task == "seq2seq":
        whole, labels = reader.answers(firsts, seconds)
        classes = None
    else:
        whole = reader.lines(firsts, seconds)
    splits = {s: {k: v[i] for k, v in whole.items()} for s, i in parts.items()}
    held = {} if labels is None else {s: labels[i] for s, i in parts.items()}
    return as_splits(splits, path.name, held, classes)


def _read(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError("cannot read JSON", f"{path} line {number}", str(error)[:160]) from None
        if not isinstance(row, dict):
            raise DataError(
                "a line is no object", f"{path} line {number}", "", 'write {"text": ...}'
            )
        rows.append(row)
    return rows


def _parts(rows: Sequence[Row], path: Path) -> dict[str, Tensor]:
    """Return the rows of every split."""
    if "split" not in rows[0]:
        n = len(rows)
        if n < 10:
            raise DataError(
                "too few samples to split", str(path), f"{n} of them", "give 10 or more"
            )
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        train, validation, test = order.split([n - 2 * (n // 10), n // 10, n // 10])
        return {"train": train, "validation": validation, "test": test}
    found: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        split = SPLITS.get(str(row.get("split")))
        if split is None:
            where = f"{path} line {number + 1}"
            raise DataError("unknown split", where, repr(row.get("split")), f"use {set(SPLITS)}")
        found.setdefault(split, []).append(number)
    return {split: torch.tensor(numbers) for split, numbers in found.items()}


def _streams(
    reader: Reader, rows: Sequence[Row], parts: Mapping[str, Tensor], name: str
) -> dict[str, Inputs]:
    made = {}
    for split, numbers in parts.items():
        windows = reader.windows([str(rows[i][name]) for i in numbers.tolist()])
        if not len(windows["input_ids"]):
            raise DataError(
                "too little text", f"{reader.where} {split}",
                f"it has less than {reader.tokens} tokens", "give more of it, or ?tokens=N",
            )  # fmt: skip
        made[split] = {**windows, "labels": windows["input_ids"]}
    return made


def _labels(rows: Sequence[Row], network: Network, path: Path) -> tuple[Tensor | None, int | None]:
    """Return the labels as classes or numbers, and the number of classes."""
    if "label" not in rows[0]:
        return None, None
    given = [row.get("label") for row in rows]
    kinds = {type(v) for v in given}
    if kinds == {str}:
        config: Any = network.module.config
        known = getattr(config, "label2id", None) or {}
        names = sorted({str(v) for v in given})
        if not all(name in known for name in names):
            known = {name: number for number, name in enumerate(names)}
        return torch.tensor([int(known[str(v)]) for v in given]), len(known)
    if kinds <= {int, bool} and all(int(v) >= 0 for v in given):  # type: ignore[arg-type]
        numbers = torch.tensor([int(v) for v in given])  # type: ignore[arg-type]
        return numbers, int(numbers.max()) + 1
    if kinds <= {int, float}:
        return torch.tensor([float(v) for v in given]), None  # type: ignore[arg-type]
    number = next(i for i, v in enumerate(given, 1) if type(v) not in (int, float, bool))
    raise DataError(
        "labels of several kinds", f"{path} line {number}",
        f"{given[number - 1]!r}"[:60], "give each line a label of one kind",
    )  # fmt: skip
