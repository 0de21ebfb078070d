"""The work of this benchmark: movie snippets as batches of tokens, and a classifier of them.

The snippets are 10,605 sentences with twenty human scores each. The label of one is the sign of its
mean score. How to fetch them: `python -m pip download --no-deps --no-build-isolation
vaderSentiment==0.5`; the archive inside, `additional_resources/hutto_ICWSM_2014.tar.gz`, holds
`movieReviewSnippets_GroundTruth.txt`: number, mean score, text.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INSIDE = "hutto_ICWSM_2014.tar.gz"
TABLE = "movieReviewSnippets_GroundTruth.txt"
TOKENS = 64


class Classifier(nn.Module):
    """An encoder, the mean of its tokens, and one linear layer.

    Args:
        encoder: a BertModel.
        width: of its tokens.
    """

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        tokens = states.last_hidden_state
        mask = attention_mask[..., None].to(tokens.dtype)
        mean = (tokens * mask).sum(1) / mask.sum(1).clamp_min(1.0)
        logits: Tensor = self.head(self.drop(mean))
        return logits


def build(folder: Path, seed: int) -> Classifier:
    """Return the pretrained encoder with a new head; its dropout is as its config says."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    return Classifier(encoder.float(), encoder.config.hidden_size)


def read_snippets(path: Path) -> list[tuple[str, int]]:
    """Return (text, 1 where people liked it) of every snippet, from the archive or the table."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as outer:
            name = next(n for n in outer.namelist() if n.endswith(INSIDE))
            held = io.BytesIO(outer.read(name))
        with tarfile.open(fileobj=held) as inner:
            member = next(m for m in inner.getmembers() if m.name.endswith(TABLE))
            data = inner.extractfile(member).read()  # type: ignore[union-attr]
    else:
        data = path.read_bytes()
    found = []
    for line in data.decode("latin-1").splitlines():
        fields = line.split("\t")
        if len(fields) >= 3 and float(fields[1]) != 0:
            found.append((fields[-1], int(float(fields[1]) > 0)))
    return found


class Batches:
    """Batches of snippets of about one length, in a seeded order for every epoch.

    Args:
        ids: token numbers of each snippet.
        labels: of each.
        size: of a batch.
        shuffle: draw a new order every epoch.
        seed: of the order.
    """

    def __init__(
        self, ids: list[list[int]], labels: list[int], size: int, shuffle: bool, seed: int = 0
    ) -> None:
        self.ids, self.labels, self.size = ids, labels, size
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.dataset_size = len(ids)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return (len(self.ids) + self.size - 1) // self.size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        self.epoch += 1
        order = list(range(len(self.ids)))
        if self.shuffle:
            order = torch.randperm(len(order), generator=generator).tolist()
            pool = 16 * self.size
            order = [
                i
                for start in range(0, len(order), pool)
                for i in sorted(order[start : start + pool], key=lambda i: len(self.ids[i]))
            ]
        groups = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        if self.shuffle:
            groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        for group in groups:
            yield self._batch(group)

    def _batch(self, group: list[int]) -> dict[str, Tensor]:
        longest = max(len(self.ids[i]) for i in group)
        ids = torch.zeros(len(group), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(group):
            ids[row, : len(self.ids[i])] = torch.tensor(self.ids[i])
            mask[row, : len(self.ids[i])] = 1
        labels = torch.tensor([self.labels[i] for i in group])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_data(path: Path, folder: Path, seed: int, train: int, size: int = 32) -> Any:
    """Return train, calibration, validation and test batches; the split is of the seed.

    1,000 snippets are for validation and 2,000 for the test; the rest, or `train` of it, trains.
    """
    from transformers import AutoTokenizer

    from lamina.data import Data

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    snippets = read_snippets(path)
    order = torch.randperm(len(snippets), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [snippets[i][0] for i in order]
    labels = [snippets[i][1] for i in order]
    ids = tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]
    first, second, third = 1000, 3000, 3000 + train if train else len(ids)

    def part(a: int, b: int, shuffle: bool = False, batch: int = size) -> Batches:
        if not shuffle:  # by length: less padding
            pairs = sorted(zip(ids[a:b], labels[a:b], strict=True), key=lambda p: len(p[0]))
            return Batches([p[0] for p in pairs], [p[1] for p in pairs], batch, False, seed)
        return Batches(ids[a:b], labels[a:b], batch, True, seed)

    return Data(
        train=part(second, third, True),
        calibration=list(part(second, second + 320, True)),
        validation=part(0, first, batch=100),
        test=part(first, second, batch=100),
        name="movie snippets",
        classes=2,
    )
