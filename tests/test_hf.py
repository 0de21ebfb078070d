"""After `import lamina.hf`, transformers opens small folders: other classes, dtypes, hostile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lamina import artifact
from lamina.errors import FileError, MissingExtraError, NetworkError
from lamina.exporting import export
from lamina.forms import Edit

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

from tests.exporting.models import tiny, write_file  # noqa: E402

import lamina.hf  # noqa: E402

LAYER = "bert.encoder.layer.0.intermediate.dense"
EDITS = (
    Edit(LAYER, "low_rank", {"folds": 1, "rank": 4}),
    Edit("bert.encoder.layer.1.output.dense", "tie",
         {"with": "bert.encoder.layer.0.output.dense"}),  # type: ignore[dict-item]
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, torch.Tensor]]:
    place = tmp_path_factory.mktemp("hf")
    module, inputs = tiny("BertForMaskedLM")
    write_file(place / "net.lamina", module, EDITS)
    export(place / "net.lamina", place / "folder", "lamina-hf")
    return place / "folder", module, inputs


def test_importing_lamina_does_not_import_transformers() -> None:
    code = "import sys, lamina; assert 'transformers' not in sys.modules"
    source = str(Path(artifact.__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"],
        check=True, timeout=250,
    )  # fmt: skip


def test_registering_twice_changes_nothing() -> None:
    from transformers.quantizers import auto

    before = auto.AUTO_QUANTIZER_MAPPING["lamina"]
    lamina.hf.register()
    assert auto.AUTO_QUANTIZER_MAPPING["lamina"] is before


def test_the_file_in_the_folder_is_the_file(made: Any) -> None:
    folder, _, _ = made
    small = (folder / "lamina.safetensors").read_bytes()
    assert small == (folder.parent / "net.lamina").read_bytes()
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert set(told) == {"quant_method", "format", "by"}


def test_ties_and_layers_are_those_of_the_file(made: Any) -> None:
    folder, module, inputs = made
    opened = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    low = opened.get_submodule(LAYER)
    assert isinstance(low, nn.Sequential) and len(low) == 2
    layers = opened.bert.encoder.layer
    assert layers[0].output.dense.weight is layers[1].output.dense.weight
    assert opened.cls.predictions.decoder.weight is opened.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, module(**inputs).logits)
    assert not any(t.is_meta for t in (*opened.parameters(), *opened.buffers()))


def test_other_classes_of_the_same_base_take_what_they_share(made: Any) -> None:
    folder, module, inputs = made
    with torch.no_grad():
        wanted = module.bert(**inputs)[0]
        base = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        assert torch.equal(base(**inputs)[0], wanted)
        other = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert torch.equal(other.bert(**inputs)[0], wanted)
    layers = other.bert.encoder.layer
    assert layers[0].output.dense.weight is layers[1].output.dense.weight
    assert bool(torch.isfinite(other.classifier.weight).all())  # new, to be trained


def test_a_base_goes_into_a_network_with_a_head(tmp_path: Path) -> None:
    module, inputs = tiny("BertModel")
    edits = tuple(
        Edit(e.path.removeprefix("bert."), e.form, {
            k: v.removeprefix("bert.") if isinstance(v, str) else v for k, v in e.settings.items()
        }) for e in EDITS
    )  # fmt: skip
    write_file(tmp_path / "net.lamina", module, edits)
    export(tmp_path / "net.lamina", tmp_path / "folder", "lamina-hf")
    kind = transformers.BertForSequenceClassification
    opened = kind.from_pretrained(tmp_path / "folder", num_labels=3)
    with torch.no_grad():
        assert torch.equal(opened.bert(**inputs)[0], module(**inputs)[0])
    assert opened.classifier.weight.shape[0] == 3


def test_dtype_and_device_map_are_kept_to(made: Any) -> None:
    folder, module, _ = made
    opened = transformers.AutoModelForMaskedLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu"
    )
    assert {p.dtype for p in opened.parameters()} == {torch.bfloat16}
    for name, tensor in opened.state_dict().items():
        wanted = module.state_dict()[name]
        assert torch.equal(tensor, wanted.to(tensor.dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stored_half_precision_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    module, _ = tiny("LlamaForCausalLM")
    module = module.to(torch.bfloat16)
    module.config.dtype = torch.bfloat16
    norm = module.model.norm
    norm.weight = nn.Parameter(norm.weight.detach().float() * 1.001)  # one tensor is kept wider
    write_file(tmp_path / "net.lamina", module)
    export(tmp_path / "net.lamina", tmp_path / "folder", "lamina-hf")
    exact = dtype == torch.bfloat16
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", device_map="auto", **({} if exact else {"dtype": dtype})
    )
    for name, tensor in opened.state_dict().items():
        wanted = module.state_dict()[name]
        assert torch.equal(tensor, wanted if exact else wanted.float()), name
        assert tensor.dtype == (wanted.dtype if exact else torch.float32)


def test_without_transformers_the_import_names_the_install_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.quantizers", None)
    with pytest.raises(MissingExtraError, match=r"pip install -U 'lamina\[hf\]'"):
        lamina.hf.register()


def test_gradients_flow(made: Any) -> None:
    folder, _, inputs = made
    opened = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    opened(**inputs).logits.sum().backward()
    assert opened.get_submodule(LAYER)[0].weight.grad is not None


def test_transformers_cannot_save_it_and_says_so(made: Any, tmp_path: Path) -> None:
    opened = transformers.AutoModelForMaskedLM.from_pretrained(made[0])
    with pytest.raises(NetworkError, match="copy the folder"):
        opened.save_pretrained(tmp_path / "again")


def test_disk_offload_is_refused(made: Any) -> None:
    with pytest.raises(NetworkError, match="cannot be left on disk"):
        transformers.AutoModelForMaskedLM.from_pretrained(made[0], device_map={"": "disk"})


def test_a_class_with_another_base_is_refused(made: Any, tmp_path: Path) -> None:
    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=100, max_position_embeddings=32,
    )  # fmt: skip
    config.quantization_config = {"quant_method": "lamina", "format": 1}
    folder = shutil.copytree(made[0], tmp_path / "folder")
    config.save_pretrained(folder)
    with pytest.raises(FileError, match="no base model in common"):
        transformers.RobertaModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"quant_method": "lamina"}, "unknown format"),
        ({"quant_method": "lamina", "format": 2}, "update lamina"),
        ({"quant_method": "lamina", "format": True}, "unknown format"),
        ({"quant_method": "lamina", "format": 1, "file": "../../x"}, "unknown settings.*file"),
        ({"quant_method": "lamina", "format": 1, "auto_map": {}}, "unknown settings.*auto_map"),
        ({"quant_method": "lamina", "format": 1, "by": {}}, "by is no text"),
    ],
)
def test_hostile_settings_are_refused(
    made: Any, tmp_path: Path, told: dict[str, Any], text: str
) -> None:
    folder = shutil.copytree(made[0], tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    with pytest.raises(FileError, match=text):
        transformers.AutoModelForMaskedLM.from_pretrained(folder)


def test_another_size_in_config_json_is_refused(made: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(made[0], tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(FileError, match="does not fit"):
        transformers.AutoModelForMaskedLM.from_pretrained(folder)


def test_a_damaged_file_is_refused(made: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(made[0], tmp_path / "folder")
    file = folder / "lamina.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(FileError, match="damaged"):
        transformers.AutoModelForMaskedLM.from_pretrained(folder)


def test_nothing_but_opening_is_offered() -> None:
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    from transformers.quantizers import auto

    told = auto.AutoQuantizationConfig.from_dict({"quant_method": "lamina", "format": 1})
    assert config.model_type == "bert"
    with pytest.raises(NetworkError, match=r"use lamina\.compress"):
        auto.AutoHfQuantizer.from_config(told, pre_quantized=False)


def test_without_the_import_a_small_folder_does_not_open(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "lamina")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "lamina")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModelForMaskedLM.from_pretrained(made[0])
