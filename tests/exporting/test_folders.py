"""Folders of transformers: dense ones open without Lamina, small ones after one import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lamina import artifact
from lamina.errors import FileError, NetworkError, RunError
from lamina.exporting import export, folders, write_dense_folder, write_small_folder
from lamina.forms import Edit

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

from tests.exporting.models import tiny, write_file  # noqa: E402

LOW_RANK = Edit("model.layers.0.mlp.up_proj", "low_rank", {"folds": 1, "rank": 4})
TIE = Edit("encoder.layer.1.output.dense", "tie", {"with": "encoder.layer.0.output.dense"})  # type: ignore[dict-item]
DENSE = {  # class: edits that leave the shapes
    "BertModel": (TIE,),
    "BertForMaskedLM": (),
    "GPT2LMHeadModel": (Edit("transformer.h.0.mlp.c_fc", "int8"),),
    "LlamaForCausalLM": (),
    "T5ForConditionalGeneration": (),
    "ViTForImageClassification": (),
    "MixtralForCausalLM": (),
}
SMALL = {
    **DENSE,
    "LlamaForCausalLM": (LOW_RANK, Edit("model.layers.1.self_attn.o_proj", "biased")),
    "T5ForConditionalGeneration": (
        Edit("encoder.block.0.layer.0.SelfAttention.v", "gathered", {"channels": 20}),
    ),
}
READER = """
import sys, json, torch, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=FutureWarning)
torch.set_num_threads(1)
if sys.argv[1] == "plain":
    sys.modules["lamina"] = None  # importing it fails
else:
    import lamina.hf
import transformers
transformers.logging.disable_progress_bar()
for name, folder, inputs, out in json.loads(sys.argv[2]):
    model, said = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"], (name, said)
    assert not model.training
    with torch.no_grad():
        torch.save(model(**torch.load(inputs))[0], out)
"""


def outputs_in_a_fresh_process(how: str, cases: list[list[str]]) -> str:
    """Open folders in another process, which writes what each network gives; return its errors."""
    source = str(Path(artifact.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER, how, json.dumps(cases)],
        check=False, env=env, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.parametrize("how", ["plain", "after import lamina.hf"])
def test_every_folder_opens_in_a_fresh_process_bit_for_bit(tmp_path: Path, how: str) -> None:
    cases, wanted = [], {}
    for name, edits in (DENSE if how == "plain" else SMALL).items():
        place = tmp_path / name
        module, inputs = tiny(name)
        made = write_file(place / "net.lamina", module, edits)
        for layer in made.modules():
            layer.train().eval()  # packed integers are made anew
        to = "hf" if how == "plain" else "lamina-hf"
        assert "from_pretrained" in export(place / "net.lamina", place / "folder", to)
        torch.save(inputs, place / "inputs.pt")
        if how == "plain" and any(e.form == "int8" for e in edits):
            made = tiny(name)[0]  # there its layers multiply floats
            state = artifact.read(place / "net.lamina").state()
            made.load_state_dict(state, strict=False)
            made.tie_weights()
        with torch.no_grad():
            wanted[name] = made(**inputs)[0]
        paths = (place / "folder", place / "inputs.pt", place / "out.pt")
        cases.append([name, *map(str, paths)])
    said = outputs_in_a_fresh_process(how, cases)
    assert "MISSING" not in said and "UNEXPECTED" not in said
    for name, *_, out in cases:
        assert torch.equal(torch.load(out), wanted[name]), name


def test_a_dense_folder_has_the_names_and_the_files_that_transformers_would_write(
    tmp_path: Path,
) -> None:
    for name in ("GPT2LMHeadModel", "BertForMaskedLM", "LlamaForCausalLM"):
        module, _ = tiny(name)
        file = tmp_path / name / "net.lamina"
        made: Any = write_file(file, module)
        write_dense_folder(artifact.read(file), tmp_path / name / "ours")
        made.save_pretrained(str(tmp_path / name / "theirs"))
        ours, theirs = tmp_path / name / "ours", tmp_path / name / "theirs"
        assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
        mine, other = (load_file(p / "model.safetensors") for p in (ours, theirs))
        assert set(mine) == set(other)
        assert all(torch.equal(mine[n], other[n]) for n in mine)
        told, said = (json.loads((p / "config.json").read_text()) for p in (ours, theirs))
        assert told == said


def test_large_folders_are_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    module, inputs = tiny("BertModel")
    made = write_file(tmp_path / "net.lamina", module)
    whole = artifact.write_shards
    monkeypatch.setattr(artifact, "write_shards", lambda r, f: whole(r, f, 20_000))
    write_dense_folder(artifact.read(tmp_path / "net.lamina"), tmp_path / "folder")
    index = json.loads((tmp_path / "folder/model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in (tmp_path / "folder").glob("model-*.safetensors"))
    assert len(shards) > 3 and set(index["weight_map"].values()) == set(shards)
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = sum(t.numel() * t.element_size() for t in made.state_dict().values())
    assert index["metadata"]["total_size"] == total
    opened = transformers.BertModel.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(opened(**inputs)[0], made(**inputs)[0])


def test_changed_layers_are_refused_and_named(tmp_path: Path) -> None:
    module, _ = tiny("LlamaForCausalLM")
    write_file(tmp_path / "net.lamina", module, (LOW_RANK,))
    with pytest.raises(NetworkError, match=r"mlp\.up_proj low_rank.*use --to lamina-hf"):
        export(tmp_path / "net.lamina", tmp_path / "folder", "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.lamina"]


def test_what_lies_beside_the_weights_comes_along_and_nothing_else(tmp_path: Path) -> None:
    like = tmp_path / "original"
    (like / "1_Pooling").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "1_Pooling/config.json"):
        (like / name).write_text("{}")
    for name in ("model.safetensors", "modeling.py", "tokenizer.py", "config.json", "x.bin"):
        (like / name).write_text("no")
    module, _ = tiny("BertModel")
    write_file(tmp_path / "net.lamina", module)
    export(tmp_path / "net.lamina", tmp_path / "folder", "hf", like=like)
    found = sorted(
        str(p.relative_to(tmp_path / "folder")) for p in (tmp_path / "folder").rglob("*.*")
    )
    assert found == [
        "1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip
    assert "model_type" in (tmp_path / "folder/config.json").read_text()


def test_a_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = tiny("BertModel")
    write_file(tmp_path / "net.lamina", module)
    package = artifact.read(tmp_path / "net.lamina")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "_write_config", fail)
    for write in (
        lambda out: write_dense_folder(package, out),
        lambda out: write_small_folder(package, tmp_path / "net.lamina", out),
    ):
        with pytest.raises(RunError, match="No space left"):
            write(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["net.lamina"]


def test_wrong_arguments_are_refused_in_one_line(tmp_path: Path) -> None:
    module, _ = tiny("BertModel")
    file = tmp_path / "net.lamina"
    write_file(file, module)
    other = tmp_path / "other.lamina"
    other.write_bytes(artifact.pack(torch.nn.Linear(2, 2), (), "module", {}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    cases: list[tuple[Any, Any, str, dict[str, Any], type[Exception], str]] = [
        (file, "full", "hf", {}, RunError, "not empty"),
        (file, "net.lamina", "lamina-hf", {}, RunError, "it is a file"),
        (file, "new", "gguf", {}, FileError, "there are safetensors, pt, hf"),
        (file, "new", "hf", {"like": tmp_path / "none"}, NetworkError, "no such folder"),
        (file, "new", "hf", {"int8": True}, FileError, "int8 has no meaning here"),
        (file, "new", "safetensors", {"like": tmp_path}, FileError, "leave it out"),
        (file, "new", "onnx", {"tolerance": -1.0}, FileError, "a positive number"),
        (other, "new", "hf", {}, NetworkError, "not a network of transformers"),
        (other, "new", "lamina-hf", {}, NetworkError, "not a network of transformers"),
    ]
    for source, out, to, more, kind, text in cases:
        with pytest.raises(kind, match=text) as caught:
            export(source, tmp_path / out, to, **more)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
