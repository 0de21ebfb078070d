"""Hugging Face folders all the way: compressed, opened in a fresh process, and from the shell."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.folders import KINDS, save_folder, save_tokenizer, write_text
from tests.own import FAST, start_lamina

pytest.importorskip("transformers")

import lamina
from lamina import cli
from lamina.compress import compress
from lamina.errors import DataError, NetworkError
from lamina.opening import open_model

FRESH = """
import sys, torch, socket
from pathlib import Path
def refuse(*args, **kwargs): raise AssertionError("something asked for the network")
socket.socket.connect = socket.getaddrinfo = refuse
torch.set_num_threads(1)
import lamina
for path in sorted(Path(sys.argv[1]).glob("*.lamina")):
    kept = torch.load(path.with_suffix(".pt"))
    with torch.no_grad():
        found = lamina.load(path)(**kept["inputs"])[0]
    print(path.stem, torch.equal(found, kept["output"]) and found.dtype == kept["output"].dtype)
"""


LAYERS = {"gpt2": "n_layer", "t5": "num_layers"}  # what others call num_hidden_layers


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """Measure latency, which every report does, in as few rounds as there may be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["lamina.report.compare"], "ROUNDS", 3)
        yield


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a fresh process found of the files of every family; their folders are gone."""
    room = tmp_path_factory.mktemp("files")
    for name in KINDS:
        folder = tmp_path_factory.mktemp(name)
        save_folder(name, folder, **{LAYERS.get(name, "num_hidden_layers"): 1})
        network = open_model(folder)
        methods = ["alds", "rdoq"] if name == "bert" else ["rdoq"]
        result = compress(network, None, "30%", recover=None, methods=methods)
        assert len(result.file) <= 0.3 * network.disk_bytes
        result.save(room / f"{name}.lamina")
        inputs = dict(network.example_kwargs)
        with torch.no_grad():
            output = result.model(**inputs)[0]
        torch.save({"inputs": inputs, "output": output}, room / f"{name}.pt")
        for file in folder.iterdir():
            file.unlink()
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(room)], capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("HF_")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())  # type: ignore[misc]


@pytest.mark.parametrize("name", KINDS)
def test_a_fresh_process_gives_the_same_bits(verdicts: dict[str, str], name: str) -> None:
    assert verdicts[name] == "True"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, an encoder, and a text."""
    folder = tmp_path_factory.mktemp("shell")
    for name in ("gpt2", "bert"):
        save_folder(name, folder / name, **{LAYERS.get(name, "num_hidden_layers"): 1})
        save_tokenizer(folder / name)
    write_text(folder / "corpus.txt")
    return folder


COMPRESS = (
    "compress",
    "gpt2",
    "--data",
    "text:corpus.txt",
    "--size",
    "10x",
    "--samples",
    "32",
    *FAST,
)


def test_inspect_lists_the_layers_of_a_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    words = ("--data", "text:corpus.txt", "--samples", "8", "--methods", "rdoq")
    assert cli.main(["inspect", "bert", *words]) == 0
    assert "encoder.layer.0.output.dense" in capsys.readouterr().out


def test_compress_resumes_after_ctrl_c_and_the_file_can_be_judged(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert cli.main([*COMPRESS, "-o", "whole"]) == 0
    assert "perplexity" in capsys.readouterr().out
    with start_lamina(*COMPRESS, "-o", "cut", cwd=place) as process:
        limit = time.monotonic() + 300
        while not list((place / "cut").glob("stages/stats-*")):
            assert process.poll() is None, "it ended before it could be stopped"
            assert time.monotonic() < limit
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130, err
    assert cli.main([*COMPRESS, "-o", "cut"]) == 0
    file = place / "cut" / "net.lamina"
    assert file.read_bytes() == (place / "whole" / "net.lamina").read_bytes()
    facts = json.loads((place / "whole" / "report.json").read_text(encoding="utf-8"))
    disk = (place / "gpt2" / "model.safetensors").stat().st_size
    assert facts["size"]["original"] == disk and file.stat().st_size <= disk / 10
    capsys.readouterr()
    spec = "text:corpus.txt?tokenizer=gpt2"
    assert cli.main(["evaluate", str(file), "--data", spec, "--metric", "perplexity"]) == 0
    assert re.match(r"perplexity \d", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpt2", "--data", "text:none.txt"], "no such file"),
        (["gpt2", "--data", "jsonl:corpus.txt"], "cannot read JSON"),
        (["gpt2", "--data", "text:corpus.txt?tokens=9999"], "bad number of tokens"),
        (["none", "--data", "text:corpus.txt"], "unknown network"),
        (["gpt2", "--data", "text:gpt2/model.safetensors"], "cannot read text"),
    ],
)
def test_what_is_wrong_is_one_line(place: Path, words: list[str], said: str, monkeypatch: Any,
                                   capsys: Any) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    assert cli.main(["compress", *words, "--size", "10x", "-o", "runs/x"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.strip().splitlines()) == 1


def test_a_gguf_file_counts_as_large_as_it_lies_on_the_disk(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf", gguf)
    network = open_model(str(tmp_path / "tiny.gguf"))
    assert network.task == "causal" and network.disk_bytes < 0.6 * sum(
        4 * p.numel() for p in network.module.parameters()
    )
    assert open_model(tmp_path).digest() == network.digest()  # the folder it lies in
    result = compress(network, None, "60%", recover=None, methods=["rdoq"])
    size = result.report.facts["size"]
    assert size["original"] == (tmp_path / "tiny.gguf").stat().st_size
    assert len(result.file) <= 0.6 * size["original"]
    assert any("on disk (GGUF)" in note for note in result.report.facts["notes"])
    result.save(tmp_path / "net.lamina")
    inputs = network.example_kwargs
    with torch.no_grad():
        ours, theirs = result.model(**inputs)[0], lamina.load(tmp_path / "net.lamina")(**inputs)[0]
    assert torch.equal(ours, theirs)
    (tmp_path / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(NetworkError, match="several GGUF files"):
        open_model(tmp_path)
    with pytest.raises(NetworkError, match="cannot be opened"):
        open_model(str(tmp_path / "second.gguf"))


def write_gguf(path: Path, gguf: Any) -> None:
    """Write a tiny llama of half precision."""
    import numpy as np

    draw = np.random.default_rng(0)
    made = gguf.GGUFWriter(str(path), "llama")
    made.add_block_count(1)
    made.add_context_length(32)
    made.add_embedding_length(32)
    made.add_feed_forward_length(48)
    made.add_head_count(4)
    made.add_head_count_kv(4)
    made.add_layer_norm_rms_eps(1e-5)
    made.add_rope_dimension_count(8)
    made.add_vocab_size(64)
    made.add_tokenizer_model("gpt2")
    made.add_token_list([f"t{i}" for i in range(64)])
    shapes = {"token_embd": (64, 32), "output": (64, 32)}
    shapes |= {f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{n}": (48, 32) for n in ("ffn_gate", "ffn_up")}
    shapes |= {"blk.0.ffn_down": (32, 48)}
    for name, shape in shapes.items():
        made.add_tensor(f"{name}.weight", (0.1 * draw.normal(size=shape)).astype(np.float16))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        made.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def test_metrics_that_need_no_labels_have_names(place: Path) -> None:
    from lamina.data import load
    from lamina.measure.quality import evaluate

    network = open_model(place / "bert")
    data = load(f"text:{place / 'corpus.txt'}", network=network)
    other = compress(network, None, "20%", recover=None, methods=["rdoq"]).model
    for name in ("embedding", "cosine"):
        same = evaluate(network, data.test, name, original=network)
        less = evaluate(other, data.test, name, original=network)
        assert same == pytest.approx(1) and 0.5 < less < 1
    with pytest.raises(DataError, match="no labels for a probe"):
        evaluate(other, data.test, "probe", original=network)
