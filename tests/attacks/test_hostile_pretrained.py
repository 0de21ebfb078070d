"""Hostile texts of pretrained networks: each is a FileError, soon, and without much memory."""

from __future__ import annotations

import json
import resource
import socket
import sys
from typing import Any

import pytest
import torch
from tests.attacks.confined import room
from tests.attacks.files import seal
from tests.attacks.fuzz import deadline

pytest.importorskip("transformers")

from lamina.errors import FileError
from lamina.opening import load, open_model

BERT = {
    "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 8,
}  # fmt: skip
BODY = b"\0" + bytes(24)  # a plain tensor of 2 x 3


def text(kind: Any, config: Any) -> str:
    return "transformers:" + json.dumps({"class": kind, "config": config})


def bert(**changes: Any) -> str:
    return text("BertModel", {**BERT, **changes})


TEXTS: dict[str, str] = {
    "nothing": "transformers:",
    "no JSON": "transformers:{",
    "a list": "transformers:[]",
    "a number": "transformers:3",
    "null": "transformers:null",
    "no class": 'transformers:{"config": {}}',
    "no config": 'transformers:{"class": "BertModel"}',
    "deep lists": "transformers:" + "[" * 50_000,
    "a deep config": 'transformers:{"class": "BertModel", "config": '
    + '{"a":' * 5_000 + "1" + "}" * 5_001,
    **{f"class {kind!r}": text(kind, BERT) for kind in (
        None, 3, ["BertModel"], "", "x" * 10_000, "__class__", "../BertModel", "os.system",
        "AutoModel", "PreTrainedModel", "BertConfig", "BertTokenizer", "pipeline", "Trainer",
        "no_such", "BertModel\u200b", "evil/BertModel", "TimmBackbone", "TimmWrapperModel",
        "RagModel", "EncoderDecoderModel")},
    **{f"config {config!r}": text("BertModel", config) for config in (
        None, 3, "bert-base-uncased", [], [BERT], True)},
    **{f"{name} of {value!r}"[:60]: bert(**{name: value}) for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
        "max_position_embeddings", "hidden_act")
       for value in (-1, 0.5, "3", None, [], {"a": 1}, [[1]], "../../etc/passwd")
       if (name, value) not in (("hidden_act", None), ("max_position_embeddings", -1))},
    **{f"{name} of {value}": bert(**{name: value}) for name in (
        "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_labels",
        "max_position_embeddings", "type_vocab_size")
       for value in (1 << 20, 1 << 31, 1 << 40, 1 << 63, 1 << 200)},
    "layers that cost nothing": text("PoolFormerModel", {"depths": [16_000] * 4}),
    "many little layers": text("ResNetModel", {"depths": [16_000] * 4, "hidden_sizes": [1] * 4}),
    "layers of a nested config": text("CLIPModel", {
        "text_config": {"num_hidden_layers": 1 << 30}, "vision_config": {}}),
    "a large buffer": text("GPTNeoForCausalLM", {
        "hidden_size": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 16,
        "attention_types": [[["global"], 2]], "max_position_embeddings": 1 << 17}),
    "sines of many places": text("MarianModel", {
        "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 16,
        "max_position_embeddings": 1 << 30}),
    "a backbone to fetch": text("DetrModel", {
        "use_timm_backbone": True, "backbone": "resnet50", "use_pretrained_backbone": True}),
    "a backbone of a hub": text("UperNetForSemanticSegmentation", {
        "backbone": "someone/something", "use_pretrained_backbone": True}),
    "a backbone of timm": text("DetrModel", {
        "backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:someone/x"}}),
    "an inner model of a hub": text("LlavaModel", {
        "text_config": "someone/something", "vision_config": {"model_type": "evil"}}),
    "methods of the configuration": bert(to_dict=3, from_dict=3, get_text_config=3),
    "sizes of other names": bert(attribute_map={"hidden_size": "vocab_size"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something asked for the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported is not the file's doing."""
    path = tmp_path_factory.mktemp("warm") / "net.lamina"
    kinds = ["PoolFormerModel", "ResNetModel", "CLIPModel", "GPTNeoForCausalLM", "MarianModel"]
    kinds += ["DetrModel", "UperNetForSemanticSegmentation", "LlavaModel", "BertModel"]
    for kind in kinds:
        path.write_bytes(seal({"skeleton": text(kind, {}), "tensors": "a:2,3"}, BODY))
        with pytest.raises(FileError):
            load(path)


@pytest.mark.parametrize("name", TEXTS)
def test_it_is_refused(tmp_path, name):
    path = tmp_path / "net.lamina"
    path.write_bytes(seal({"skeleton": TEXTS[name], "tensors": "weight:2,3"}, BODY))
    before = resource.getrlimit(resource.RLIMIT_AS)
    confined = sys.platform == "linux"
    if confined:
        resource.setrlimit(resource.RLIMIT_AS, room(512 << 20))
    try:
        for opened in (load, open_model):
            with deadline(20.0), pytest.raises(FileError) as caught:
                opened(path)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    finally:
        if confined:
            resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_base_of_the_attacks_is_valid(tmp_path):
    """What the hostile texts change one thing of is a network that is built."""
    from lamina.network.pretrained import build_pretrained

    module = build_pretrained(bert())
    held = {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}
    assert build_pretrained(bert(), held).state_dict().keys() == held.keys()
    assert all(p.is_meta for p in module.parameters())
    assert module.config.hidden_size == 8 and torch.get_default_dtype() == torch.float32


def test_what_would_run_code_is_left_out():
    """A kernel of a hub, code of a hub, another way to write it: the network is plain all the
    same."""
    from lamina.network.pretrained import build_pretrained

    module = build_pretrained(
        bert(
            attn_implementation="someone/kernel", _attn_implementation="someone/kernel",
            _attn_implementation_internal="someone/kernel", use_kernels=True,
            auto_map={"AutoModel": "someone/evil--evil.M"}, trust_remote_code=True,
            quantization_config={"quant_method": "someone"}, name_or_path="someone/something",
        )
    )  # fmt: skip
    assert module.config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(module.config, "auto_map") and not hasattr(module, "hf_quantizer")
