"""Text and JSON lines, cut by a folder's tokenizer: what samples hold, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.folders import save_folder, save_tokenizer, write_text

pytest.importorskip("transformers")

from lamina.data import load, text
from lamina.errors import DataError
from lamina.network.pretrained import open_folder
from lamina.network.source import Network


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Network]:
    made = {}
    for name in ("bert", "classifier", "gpt2", "t5", "vit"):
        folder = tmp_path_factory.mktemp(name)
        save_folder(name, folder)
        save_tokenizer(folder)
        made[name] = open_folder(folder)
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "corpus.txt")


def inputs(loader: Any) -> list[dict[str, torch.Tensor]]:
    return [b[0] if isinstance(b, tuple) else b for b in loader]


def runs(network: Network, loader: Any) -> None:
    for batch in inputs(loader):
        assert torch.isfinite(network.forward(**batch)).all()


def test_a_language_model_gets_windows_of_the_whole_text(
    networks: dict[str, Network], corpus: Path
) -> None:
    network = networks["gpt2"]
    data = load(f"text:{corpus}", network=network)
    tokens = text.tokenizer_of(network)(corpus.read_text(), verbose=False)["input_ids"]
    parts = [data.train, data.validation, data.test]
    shown = torch.cat([loader.x["input_ids"].flatten() for loader in parts])  # type: ignore[union-attr]
    assert shown.tolist() == tokens[: len(shown)] and len(tokens) - len(shown) < 32
    for x, y in data.validation or ():
        assert torch.equal(x["input_ids"], y) and x["input_ids"].shape[1] == 32
        assert bool(x["attention_mask"].all())
    runs(network, data.test)


def test_tokens_says_how_long_samples_are(networks: dict[str, Network], corpus: Path) -> None:
    data = load(f"text:{corpus}?tokens=8", network=networks["gpt2"])
    assert {x["input_ids"].shape[1] for x, _ in data.validation or ()} == {8}
    lines = load(f"text:{corpus}?tokens=5", network=networks["bert"])
    assert max(x["input_ids"].shape[1] for x in lines.calibration or ()) == 5


def test_an_encoder_gets_lines_padded_on_the_right(
    networks: dict[str, Network], corpus: Path
) -> None:
    network = networks["bert"]
    data = load(f"text:{corpus}", network=network)
    tokenizer = text.tokenizer_of(network)
    wanted = [tokenizer(line)["input_ids"] for line in corpus.read_text().splitlines()]
    found = []
    for batch in inputs(data.validation):
        assert int(batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1]  # trimmed
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            count = int(mask.sum())
            assert bool(mask[:count].all()) and not bool(ids[count:].any())
            found.append(ids[:count].tolist())
    assert found == wanted[160:180]  # 80 to 90 % of the lines
    runs(network, data.test)


def test_an_encoder_decoder_is_to_repeat_the_line(
    networks: dict[str, Network], corpus: Path
) -> None:
    network = networks["t5"]
    data = load(f"text:{corpus}", network=network)
    for batch in inputs(data.validation):
        assert bool((batch["decoder_input_ids"][:, 0] == 0).all())
        assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
    runs(network, data.validation)


def write(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


def test_jsonl_labels_follow_their_texts(networks: dict[str, Network], tmp_path: Path) -> None:
    rows = [{"text": "good" if i % 3 else "bad film", "label": "up" if i % 3 else "down"}
            for i in range(60)]  # fmt: skip
    network = networks["classifier"]
    data = load(write(tmp_path / "a.jsonl", *rows), network=network)
    tokenizer, seen = text.tokenizer_of(network), 0
    bad = tokenizer("bad")["input_ids"][1]
    for loader in (data.train, data.validation, data.test):
        for x, y in loader or ():
            assert torch.equal((x["input_ids"] == bad).any(1), y == 0)  # down comes before up
            seen += len(y)
    assert seen == 60 and data.classes == 2
    runs(network, data.test)


def test_jsonl_labels_are_numbered_as_the_network_names_them(
    networks: dict[str, Network], tmp_path: Path
) -> None:
    network = networks["classifier"]
    before = network.module.config.label2id
    network.module.config.label2id = {"up": 0, "down": 1}  # type: ignore[assignment]
    rows = [{"text": "good", "label": "up"}] * 10 + [{"text": "bad", "label": "down"}] * 10
    try:
        data = load(write(tmp_path / "a.jsonl", *rows), network=network)
    finally:
        network.module.config.label2id = before
    good = text.tokenizer_of(network)("good")["input_ids"][1]
    for x, y in data.train or ():
        assert torch.equal((x["input_ids"] == good).any(1), y == 0)


def test_jsonl_pairs_and_splits_of_its_own(networks: dict[str, Network], tmp_path: Path) -> None:
    rows = [{"sentence1": "a film", "sentence2": "the plot", "label": i / 2, "split": split}
            for i, split in enumerate(["train"] * 4 + ["dev"] * 3 + ["test"])]  # fmt: skip
    data = load(write(tmp_path / "a.jsonl", *rows), network=networks["bert"])
    sizes = [loader.dataset_size for loader in (data.train, data.validation, data.test)]  # type: ignore[union-attr]
    assert sizes == [4, 3, 1] and data.classes is None
    (x, y), *_ = list(data.validation or ())
    assert y.tolist() == [2.0, 2.5, 3.0]
    assert x["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    runs(networks["bert"], data.validation)


def test_jsonl_answers_of_an_encoder_decoder(networks: dict[str, Network], tmp_path: Path) -> None:
    rows = [{"source": "good film", "target": "bad" if i % 2 else "a slow plot"} for i in range(20)]
    data = load(write(tmp_path / "a.jsonl", *rows), network=networks["t5"])
    for x, y in data.validation or ():
        kept = y != -100
        assert torch.equal(x["decoder_input_ids"][:, 1:][kept[:, :-1]], y[:, :-1][kept[:, :-1]])
    runs(networks["t5"], data.validation)


def test_jsonl_of_a_language_model_is_one_stream(
    networks: dict[str, Network], tmp_path: Path
) -> None:
    rows = [{"text": "the small film was good"}] * 40
    data = load(write(tmp_path / "a.jsonl", *rows) + "?tokens=8", network=networks["gpt2"])
    x, y = next(iter(data.calibration or ()))
    assert torch.equal(x["input_ids"], y) and x["input_ids"].shape[1] == 8
    ids = x["input_ids"].flatten().tolist()
    assert ids.count(2) > 1  # the end token between texts


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "cannot read JSON at .* line 1"),
        (['{"text": "a"}', "3"], "a line is no object at .* line 2"),
        (["{}"], "no text at .* line 1"),
        (['{"words": "a"}'], "it has words"),
        (['{"text": "a"}', '{"other": "a"}'], "line 2: 'text' is no text"),
        (['{"text": "a"}', '{"text": 7}'], "line 2: 'text' is no text"),
        (['{"text": "a"}'] * 9, "too few samples to split"),
        (['{"text": "a", "split": "train"}', '{"text": "a", "split": "x"}'], "unknown split .* 2"),
        (['{"text": "a", "label": 1}'] * 9 + ['{"text": "a"}'], "line 10: None"),
        (['{"text": "a", "label": 1}'] * 9 + ['{"text": "a", "label": "b"}'], "line 10: 'b'"),
    ],
)
def test_bad_jsonl_names_the_line(
    networks: dict[str, Network], tmp_path: Path, lines: list[str], said: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=said) as caught:
        load(f"jsonl:{path}", network=networks["bert"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"), (b" \n\n", "it is empty"), (b"\xff\xfe\x00x", "no UTF-8"),
        (b"PK\x03\x04\0\0", "zero bytes"), (b"a line\n" * 5, "fewer than 10 lines"),
    ],
)  # fmt: skip
def test_bad_text_is_one_line(
    networks: dict[str, Network], tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        load(f"text:{path}", network=networks["bert"])
    assert "\n" not in str(caught.value)


def test_what_does_not_go_together_is_refused(
    networks: dict[str, Network], corpus: Path, tmp_path: Path
) -> None:
    spec = f"text:{corpus}"
    with pytest.raises(DataError, match="text needs a network"):
        load(spec)
    with pytest.raises(DataError, match="reads no text"):
        load(spec, network=networks["vit"])
    with pytest.raises(DataError, match="text needs a tokenizer"):
        load(spec, network=replace(networks["bert"], folder=""))
    with pytest.raises(DataError, match="has no tokenizer"):
        load(spec, network=replace(networks["bert"], folder=str(tmp_path)))
    for number in ("1", "33"):
        with pytest.raises(DataError, match="bad number of tokens"):
            load(f"{spec}?tokens={number}", network=networks["bert"])
    for option in ("tokens=x", "tokens=", "token=3", "tokens=4&tokens", "x"):
        with pytest.raises(DataError):
            load(f"{spec}?{option}", network=networks["bert"])
    with pytest.raises(DataError, match="no such file"):
        load("text:nowhere.txt", network=networks["bert"])


def test_a_file_takes_the_tokenizer_of_another_folder(
    networks: dict[str, Network], corpus: Path
) -> None:
    network = networks["bert"]
    bare = replace(network, folder="")
    data = load(f"text:{corpus}?tokens=7&tokenizer={network.folder}", network=bare)
    assert max(x["input_ids"].shape[1] for x in data.calibration or ()) == 7


def test_a_tokenizer_of_another_network_is_noticed(
    networks: dict[str, Network], corpus: Path, tmp_path: Path
) -> None:
    save_folder("bert", tmp_path, vocab_size=8)
    network = replace(open_folder(tmp_path), folder=networks["bert"].folder)
    with pytest.raises(DataError, match="the network knows 8"):
        load(f"text:{corpus}", network=network)
