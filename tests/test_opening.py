"""Opening: folders that keep a small file, and what a time is of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina import artifact, cli
from lamina.compress import compress
from lamina.errors import BudgetError, DataError, FileError, NetworkError
from lamina.forms import Edit
from lamina.network.source import Network
from lamina.opening import open_model, with_shape, with_timed_example

pytest.importorskip("transformers")

from tests.exporting.models import tiny, write_file
from tests.folders import save_folder, save_tokenizer, write_text

LAYER = "encoder.layer.0.intermediate.dense"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder `small` of ours, the file in it, and the original's tokenizer."""
    place = tmp_path_factory.mktemp("opening")
    module, _ = tiny("BertModel")
    write_file(place / "net.lamina", module, (Edit(LAYER, "low_rank", {"folds": 1, "rank": 4}),))
    save_folder("bert", place / "bert")
    save_tokenizer(place / "bert")
    write_text(place / "corpus.txt")
    file, out = place / "net.lamina", place / "small"
    assert lamina_says("export", file, "--to", "lamina-hf", "-o", out, "--like", place / "bert")
    return place


def lamina_says(*words: object, code: int = 0) -> bool:
    return cli.main([str(word) for word in words]) == code


def test_a_small_folder_is_its_file(place: Path) -> None:
    network, file = open_model(place / "small"), open_model(place / "net.lamina")
    assert network.digest() == file.digest() and network.edits == file.edits != ()
    assert (network.name, network.folder, network.task) == (
        "small",
        str(place / "small"),
        "features",
    )
    assert network.packed_bytes == (place / "net.lamina").stat().st_size
    _, inputs = tiny("BertModel")
    module = lamina.load(place / "small")
    with torch.no_grad():
        assert torch.equal(module(**inputs)[0], network.module(**inputs)[0])
    assert isinstance(module.get_submodule(LAYER), nn.Sequential)


def test_it_goes_through_the_verbs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, text = place / "small", f"text:{place / 'corpus.txt'}"
    assert lamina_says("inspect", small)
    shown = capsys.readouterr().out
    assert "transformers:BertModel" in shown and f"edit: {LAYER} -> low_rank" in shown
    words = ("--data", text, "--metric", "cosine", "--against", small)
    assert lamina_says("evaluate", small, *words)
    assert capsys.readouterr().out.startswith("cosine 1.0000")
    assert lamina_says("bench", small, "--against", place / "net.lamina", "--seconds", "0.02")
    assert "batch 1 x 16 tokens" in capsys.readouterr().out  # it takes 32: half of that is drawn
    assert lamina_says("decompress", small, "-o", place / "dense.safetensors")
    assert lamina_says("export", small, "--to", "lamina-hf", "-o", place / "again")
    beside = {path.name for path in (place / "again").iterdir()}
    assert {"lamina.safetensors", "tokenizer.json"} <= beside
    capsys.readouterr()
    assert lamina_says("bench", small, code=2)
    assert "give --against MODEL" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["small", "small/lamina.safetensors", "net.lamina"])
def test_it_is_exported_to_onnx_as_its_file(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Network] = []

    def write(network: Network, *_: Any, **__: Any) -> Any:
        given.append(network)
        raise DataError("seen enough")

    monkeypatch.setattr("lamina.exporting.write_onnx", write)
    assert lamina_says("export", place / name, "--to", "onnx", "-o", place / "x.onnx", code=2)
    assert "seen enough" in capsys.readouterr().err
    assert given[0].digest() == open_model(place / "net.lamina").digest()


def test_compressed_again_it_says_what_its_sizes_refer_to(place: Path) -> None:
    once = (place / "net.lamina").stat().st_size
    result = compress(str(place / "small"), None, "20%", recover=None, methods=["rdoq"])
    dense = sum(t.numel() * 4 for t in open_model(place / "small").module.parameters())
    assert result.report.facts["size"]["original"] == pytest.approx(dense, rel=0.05)
    (note,) = [n for n in result.report.facts["notes"] if n.startswith("Compressed before")]
    assert f"a .lamina file of {once:,} bytes" in note
    result.save(place / "twice.lamina")
    _, inputs = tiny("BertModel")
    with torch.no_grad():
        assert torch.equal(
            lamina.load(place / "twice.lamina")(**inputs)[0], result.model(**inputs)[0]
        )


def test_it_is_not_streamed_and_a_damaged_one_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="only a Hugging Face folder can be streamed"):
        compress(str(place / "small"), None, "20%", stream=True)
    config = (place / "small" / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(FileError, match="lost its weights"):
        open_model(tmp_path)
    (tmp_path / "lamina.safetensors").write_bytes(b"no file at all")
    with pytest.raises(FileError):
        lamina.load(tmp_path)
    told = json.loads(config) | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(told), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(NetworkError, match="quantized already"):
        open_model(tmp_path)


def test_a_file_of_another_skeleton_in_the_folder_is_its_own_network(tmp_path: Path) -> None:
    """Whatever config.json says besides, the file alone says what is built."""
    (tmp_path / "lamina.safetensors").write_bytes(artifact.pack(nn.Linear(2, 2), (), "module", {}))
    told = {"model_type": "bert", "quantization_config": {"quant_method": "lamina", "format": 1}}
    (tmp_path / "config.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(FileError, match="does not say how to rebuild its network"):
        open_model(tmp_path)
    assert lamina.load(tmp_path, skeleton=nn.Linear(2, 2))(torch.zeros(1, 2)).shape == (1, 2)


def test_without_data_a_time_is_of_one_sample(place: Path) -> None:
    drawn = open_model(place / "bert")
    assert drawn.example_kwargs["input_ids"].shape == (2, 16)
    timed = with_timed_example(drawn)
    assert timed.example_kwargs["input_ids"].shape == (1, 16)  # of 32 that it takes
    module, inputs = tiny("ViTForImageClassification")
    from lamina.network.pretrained import described

    assert with_timed_example(described(module)).example_kwargs["pixel_values"].shape[0] == 1
    own = open_model(place / "bert", {"input_ids": torch.ones(3, 5, dtype=torch.int64)})
    assert set(own.example_kwargs) == {"input_ids"} and own.example_inputs == ()
    assert with_timed_example(own) is own
    other = Network(nn.Linear(2, 2), (torch.zeros(3, 2),))
    assert with_timed_example(other) is other
    assert inputs["pixel_values"].shape[0] == 2


def test_a_network_that_takes_many_tokens_is_timed_at_128() -> None:
    import transformers

    from lamina.network.pretrained import described

    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        vocab_size=20,
    )  # fmt: skip
    network = described(transformers.BertModel(config))
    assert with_timed_example(network).example_kwargs["attention_mask"].shape == (1, 128)


def test_a_shape_is_what_was_asked_for_or_refused(place: Path) -> None:
    network = open_model(place / "bert")
    padded = {**network.example_kwargs, "attention_mask": torch.tensor([[1] * 9 + [0] * 7] * 2)}
    network = open_model(place / "bert", padded)
    made = with_shape(network, 3, 24).example_kwargs
    assert made["input_ids"].shape == (3, 24) and bool(made["attention_mask"].all())
    kept = with_shape(network, 1).example_kwargs["attention_mask"]
    assert kept.sum() == 9 and with_shape(network) is network
    with pytest.raises(DataError, match=r"1 x 33 tokens.*fewer --tokens"):
        with_shape(network, 1, 33)
    with pytest.raises(DataError, match="tokens of what"):
        with_shape(Network(nn.Linear(2, 2), (torch.zeros(1, 2),)), 1, 8)
    with pytest.raises(BudgetError, match="example inputs"):
        with_shape(Network(nn.Linear(2, 2)), 2)


@pytest.mark.parametrize(
    ("words", "shape"),
    [([], (1, 16)), (["--batch", "2"], (2, 16)), (["--tokens", "9", "--batch", "3"], (3, 9)),
     (["--data", "text:corpus.txt", "--tokens", "9"], (1, 9))],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["compress", "plan"])
def test_the_shell_times_what_it_says(
    place: Path, verb: str, words: list[str], shape: tuple[int, int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seen: list[Any] = []

    def clocked(way: Any, *_: Any) -> None:
        seen.append(tuple(way.network.example_kwargs["input_ids"].shape))
        raise DataError("enough seen")

    monkeypatch.setattr("lamina.stages.clocked", clocked)
    monkeypatch.chdir(place)
    more = ["--methods", "keep", "--samples", "4", "-o", str(tmp_path / "x")]
    assert cli.main([verb, "bert", "--latency", "50%", *words, *more]) == 2
    assert seen == [shape] and "enough seen" in capsys.readouterr().err


def seconds_by_weights(jobs: Any, threads: int, seconds: float) -> list[list[float]]:
    """A machine on which every weight that is multiplied by takes a nanosecond."""

    def took(job: Any) -> float:
        layers = (m for m in job.module.modules() if not isinstance(m, nn.Embedding))
        held = sum(p.numel() for m in layers for p in m.parameters(False) if p.dim() > 1)
        return 1e-9 * held * sum(call.count for call in job.calls)

    return [[took(job) for job in jobs]] * 5


def test_a_latency_budget_goes_through_the_shell_with_text(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.modules["lamina.measure.latency"], "clock", seconds_by_weights)
    monkeypatch.chdir(place)
    words = ["compress", "bert", "--latency", "0.6x", "--data", "text:corpus.txt", "--methods"]
    more = ["alds", "--samples", "16", "--tokens", "12", "--recover", "none", "-o"]
    assert cli.main([*words, *more, str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "latency, 1 x 12 tokens" in shown and "budget met" in shown
    facts = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert (facts["latency"]["batch"], facts["latency"]["tokens"]) == (1, 12)
    assert 0.5 < facts["latency"]["after_s"] / facts["latency"]["before_s"] <= 0.6
    assert any("the example inputs, 1 x 12 tokens" in note for note in facts["notes"])
    assert any(row["chain"].startswith("alds") for row in facts["sites"])
    module = lamina.load(tmp_path / "run" / "net.lamina")
    assert any(isinstance(m, nn.Sequential) for m in module.modules())


def test_a_file_is_no_run_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.lamina"
    assert lamina_says("compress", place / "bert", "--size", "50%", "-o", out, code=2)
    assert "a run folder is asked for, not a file" in capsys.readouterr().err
    assert not out.exists()


def test_a_shape_does_not_go_with_streaming(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--size", "50%", "--stream", "--tokens", "8", "-o", tmp_path / "x")
    assert lamina_says("compress", place / "bert", *words, code=2)
    assert "do not go with streaming" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty", "not a Hugging Face folder at empty: it is empty; name the folder"),
        (".", r"it has no config\.json, but empty, net\.safetensors; name the folder"),
        ("./none", "no such file or folder at ./none; check the path"),
        ("net.safetensors", "a file of weights alone .* name the Hugging Face folder it lies in"),
        ("none", "unknown network at 'none': the zoo has"),
    ],
)
def test_what_is_no_network_says_what_it_is(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "net.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for model in (name, Path(name)) if "./" not in name else (name,):
        with pytest.raises(NetworkError, match=said):
            open_model(model)
