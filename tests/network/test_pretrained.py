"""Folders of `transformers`: opened with nothing fetched, told as a text, and built again."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.folders import KINDS, save_folder

pytest.importorskip("transformers")

from lamina.errors import FileError, NetworkError
from lamina.network.load import check_runs
from lamina.network.pretrained import build_pretrained, is_folder, open_folder
from lamina.network.skeletons import clean_config


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection fails, even where the environment says nothing of a hub."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def held_by(module: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_opens_as_it_was_saved(tmp_path: Path, name: str) -> None:
    saved = save_folder(name, tmp_path)
    network = open_folder(tmp_path)
    assert type(network.module) is type(saved) and not network.module.training
    before, after = saved.state_dict(), network.module.state_dict()
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before
    )
    assert network.disk_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert torch.isfinite(check_runs(network)).all()


@pytest.mark.parametrize("name", KINDS)
def test_a_skeleton_is_built_again_from_the_text_alone(tmp_path: Path, name: str) -> None:
    network = open_folder(tmp_path) if save_folder(name, tmp_path) else None
    assert network is not None and str(tmp_path) not in network.source
    made = build_pretrained(network.source, held_by(network.module))
    assert all(p.is_meta for p in made.parameters())
    ours, theirs = held_by(network.module), held_by(made)
    assert ours == theirs
    for (a, x), (b, y) in zip(network.module.named_buffers(), made.named_buffers(), strict=True):
        assert a == b and torch.equal(x, y) and x.dtype == y.dtype  # computed, not stored


@pytest.mark.parametrize(
    ("name", "task", "loss"),
    [
        ("bert", "features", "embedding"), ("classifier", "classify", "logits"),
        ("gpt2", "causal", "logits"), ("t5", "seq2seq", "logits"), ("vit", "image", "logits"),
        ("wav2vec2", "audio", "logits"),
    ],
)  # fmt: skip
def test_the_class_tells_what_it_is_for(tmp_path: Path, name: str, task: str, loss: str) -> None:
    save_folder(name, tmp_path)
    network = open_folder(tmp_path)
    assert (network.task, network.loss) == (task, loss)


def test_shards_are_one_network_and_their_bytes_add_up(tmp_path: Path) -> None:
    saved = save_folder("bert", tmp_path, shard="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    network = open_folder(tmp_path)
    assert len(shards) > 2
    assert network.disk_bytes == sum(s.stat().st_size for s in shards)
    after = network.module.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in saved.state_dict().items())
    shards[0].unlink()
    with pytest.raises(NetworkError, match="a file of weights is missing"):
        open_folder(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_keep_the_dtype_they_are_stored_in(tmp_path: Path, dtype: str) -> None:
    save_folder("bert", tmp_path, dtype=dtype)
    config = json.loads((tmp_path / "config.json").read_text())
    config["dtype"] = "float16"  # what the configuration says is not what was stored
    (tmp_path / "config.json").write_text(json.dumps(config))
    module = open_folder(tmp_path).module
    assert {p.dtype for p in module.parameters()} == {getattr(torch, dtype)}


def test_mixed_dtypes_are_built_as_the_file_holds_them(tmp_path: Path) -> None:
    save_folder("bert", tmp_path)
    network = open_folder(tmp_path)
    held = held_by(network.module)
    held["pooler.dense.weight"] = held["pooler.dense.weight"][0], torch.bfloat16
    made = build_pretrained(network.source, held)
    assert made.get_parameter("pooler.dense.weight").dtype == torch.bfloat16
    assert made.get_parameter("embeddings.word_embeddings.weight").dtype == torch.float32
    # of a layer that an edit made two of, these have the dtype
    pair = held.pop("pooler.dense.weight")
    held |= {"pooler.dense.0.weight": pair, "pooler.dense.1.weight": pair}
    made = build_pretrained(network.source, held)
    assert made.get_parameter("pooler.dense.weight").dtype == torch.bfloat16


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    save_folder("llama", tmp_path)
    network = open_folder(tmp_path)
    made: Any = build_pretrained(network.source, held_by(network.module))
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert made.lm_head.weight.dtype == torch.bfloat16


def break_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "-"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["EvilModel"], "auto_map": {"AutoModel": "evil.EvilModel"}}, "own code"),
        ({"architectures": "-", "model_type": "no-such"}, "unknown model"),
        ({"architectures": ["PreTrainedModel"], "model_type": "no-such"}, "unknown model"),
        ({"model_type": "-"}, "not a Hugging Face folder"),
        ({"model_type": 3}, "not a Hugging Face folder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already at .*: by gptq"),
        ({"use_timm_backbone": True}, "not of transformers alone"),
        ({"architectures": ["BertForMaskedLM"]}, "weights are not in the folder"),
        ({"hidden_size": 40}, "cannot be opened"),
        ({"num_attention_heads": 0}, "cannot be opened"),
    ],
)
def test_a_folder_that_cannot_be_opened_says_why_in_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    save_folder("bert", tmp_path)
    break_config(tmp_path, **changes)
    with pytest.raises(NetworkError, match=said) as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_of_a_folder_is_never_run(tmp_path: Path) -> None:
    save_folder("bert", tmp_path)
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    break_config(
        tmp_path, auto_map={"AutoModel": "evil.M", "AutoConfig": "evil.C"},
        attn_implementation="kernels-community/flash-attn", use_kernels=True,
    )  # fmt: skip
    network = open_folder(tmp_path)  # BertModel of transformers itself
    assert not mark.exists() and "evil" not in network.source and "kernels" not in network.source


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, struct.pack("<Q", 4) + b"[1]!", struct.pack("<Q", 2) + b"[]"]
)
def test_damaged_weights_are_one_line(tmp_path: Path, data: bytes) -> None:
    save_folder("bert", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(NetworkError) as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {"a": "../x.safetensors"}}'])
def test_a_damaged_index_is_one_line(tmp_path: Path, index: str) -> None:
    save_folder("bert", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(NetworkError) as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_folder("bert", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert is_folder(tmp_path)
    with pytest.raises(NetworkError, match="unpickled"):
        open_folder(tmp_path)


def test_a_configuration_is_cleaned_at_every_depth() -> None:
    inner = {"auto_map": {}, "attn_implementation": "x/y", "_experts_implementation_internal": "z"}
    assert clean_config({"a": [inner, {"b": 1}], "_name_or_path": "x", **inner}) == {
        "a": [{}, {"b": 1}]
    }


def test_more_than_the_file_can_mean_is_refused(tmp_path: Path) -> None:
    """The same text is fine for a large file, and not for a small one."""
    save_folder("bert", tmp_path)
    network = open_folder(tmp_path)
    told = json.loads(network.source.removeprefix("transformers:"))
    told["config"] |= {"vocab_size": 1 << 20, "hidden_size": 512, "max_position_embeddings": 8}
    text = "transformers:" + json.dumps(told)
    few = held_by(network.module)
    with pytest.raises(FileError, match="it would have over"):
        build_pretrained(text, few)
    made = build_pretrained(text, {**few, "more": ((1 << 20, 512), torch.float32)})
    assert sum(p.numel() for p in made.parameters()) > 1 << 29
