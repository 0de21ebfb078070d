"""A folder compressed layer by layer: the plan and the bytes are those of opening it whole."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.own import run_lamina

import lamina
from lamina.errors import BudgetError, InfeasibleError, NetworkError, RunError
from lamina.network.source import main_output
from lamina.run import open_run
from lamina.streaming import Streamed, layers, sampled, why_stream

Folder = Callable[[str], Path]


def stream(folder: Path, budget: str = "25%", **options: Any) -> Streamed:
    options = {"methods": ["rdoq"], **options}
    return lamina.compress(folder, None, budget, stream=True, **options)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_plan_and_file_are_those_of_the_whole_network(tiny: Folder, kind: str) -> None:
    whole = lamina.compress(tiny(kind), None, "25%", methods=["rdoq"], recover=None, stream=False)
    found = stream(tiny(kind))
    assert found.plan.dict() == whole.plan.dict()
    assert found.file == whole.file
    state = found.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in whole.model.state_dict().items())


def test_methods_that_change_form_give_the_same_file(tiny: Folder) -> None:
    plan = stream(tiny("bert"), methods=["magnitude", "kmeans"]).plan
    whole = lamina.compress(tiny("bert"), plan=plan, recover=None, stream=False)
    assert stream(tiny("bert"), plan=plan).file == whole.file


def test_the_report_tells_size_and_layers(tiny: Folder, tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = stream(tiny("bert"), run=run)
    facts = found.report.dict()
    file = tmp_path / "run" / "net.lamina"
    assert facts["size"]["file"] == file.stat().st_size == sum(r["bytes"] for r in facts["ledger"])
    assert facts["size"]["file"] <= facts["size"]["limit"] and facts["budget"]["met"]["bytes"]
    assert len(facts["sites"]) == 22 and facts["quality"]["validation"] is None
    assert "Streaming was asked for." in facts["notes"]
    assert "encoder.layer.0" in found.report.markdown() and found.report.html()
    for name in ("plan.json", "report.json", "report.html"):
        assert (tmp_path / "run" / name).is_file()


def test_a_file_without_a_run_folder_can_be_saved_and_run(tiny: Folder, tmp_path: Path) -> None:
    found = stream(tiny("bert"))
    found.save(tmp_path / "net.lamina")
    assert (tmp_path / "net.lamina").read_bytes() == found.file
    ids = torch.arange(3, 19).reshape(1, 16)
    with torch.no_grad():
        a, b = (main_output(m(input_ids=ids)) for m in (found.model, lamina.load(found.path)))
    assert torch.equal(a, b) and bool(a.isfinite().all())


def count_codings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    written: list[Path] = []
    own = layers.write_part

    def write(folder: Any, path: Path, *args: Any, **kwargs: Any) -> Any:
        written.append(path)
        return own(folder, path, *args, **kwargs)

    monkeypatch.setattr(layers, "write_part", write)
    return written


def test_a_stopped_run_goes_on_where_it_was(
    tiny: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stream(tiny("llama")).file
    written = count_codings(monkeypatch)

    def stop(stage: str, done: int, total: int, text: str) -> None:
        if stage == "code" and done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "run") as run:
        stream(tiny("llama"), run=run, watch=stop)
    before = len(written)
    assert before >= 7 and not list((tmp_path / "run").rglob("*.lamina*"))
    with open_run(tmp_path / "run") as run:
        found = stream(tiny("llama"), run=run)
    assert found.file == expected
    assert len(set(written)) == len(written)  # nothing was coded twice
    assert found.report.facts["stages"][0] == {
        "name": "read", "cached": True, "seconds": found.report.facts["stages"][0]["seconds"]
    }  # fmt: skip


def test_a_killed_process_leaves_what_the_next_one_needs(tiny: Folder, tmp_path: Path) -> None:
    expected = stream(tiny("llama")).file
    code = (
        "import os, sys, lamina\nfrom lamina.run import open_run\n"
        "def watch(stage, done, total, text):\n"
        "    if (stage, done) == ('code', 9): os.kill(os.getpid(), 9)\n"
        "with open_run(sys.argv[2]) as run:\n"
        "    lamina.compress(sys.argv[1], None, '25%', methods=['rdoq'], stream=True, run=run,"
        " watch=watch)\n"
    )
    words = [sys.executable, "-c", code, str(tiny("llama")), str(tmp_path / "run")]
    assert subprocess.run(words, check=False, capture_output=True).returncode == -9
    with open_run(tmp_path / "run") as run:
        assert stream(tiny("llama"), run=run).file == expected


def test_a_damaged_part_is_named(tiny: Folder, tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        stream(tiny("llama"), run=run)
    part = next((tmp_path / "run" / "stages").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1])
    with open_run(tmp_path / "run") as run, pytest.raises(RunError, match=part.name):
        stream(tiny("llama"), run=run)


def test_changed_weights_are_read_again(own: Folder, tmp_path: Path) -> None:
    folder = own("bert")
    safetensors = pytest.importorskip("safetensors.torch")
    with open_run(tmp_path / "run") as run:
        first = stream(folder, run=run)
    held = safetensors.load_file(folder / "model.safetensors")
    held["pooler.dense.weight"] += 1
    safetensors.save_file(held, folder / "model.safetensors", {"format": "pt"})
    with open_run(tmp_path / "run") as run:
        again = stream(folder, run=run)
    assert again.plan.network != first.plan.network and again.file == stream(folder).file


def test_a_damaged_shard_ends_before_any_work(own: Folder, tmp_path: Path) -> None:
    folder = own("llama")
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(NetworkError, match=shard.name), open_run(tmp_path / "run") as run:
        stream(folder, run=run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("budget", "options", "what"),
    [
        ("macs=50%", {}, "macs"),
        ("25%", {"recipe": "low-rank"}, "recipe"),
        ("25%", {"lossless": True}, "lossless"),
        ("25%", {"recover": 3}, "recover"),
    ],
)
def test_what_needs_the_whole_network_is_refused(
    tiny: Folder, budget: str, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(BudgetError, match=f"{what} does not go with streaming"):
        stream(tiny("bert"), budget, **options)


def test_too_small_a_budget_says_the_nearest(tiny: Folder) -> None:
    with pytest.raises(InfeasibleError, match="nearest feasible budget is size=") as caught:
        stream(tiny("bert"), "100B")
    assert stream(tiny("bert"), str(caught.value.nearest["bytes"] + 400)).report


def test_only_a_folder_can_be_streamed(tiny: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NetworkError, match="only a Hugging Face folder"):
        lamina.compress("lenet-5", None, "25%", stream=True)
    assert why_stream(tiny("bert"), None) == "" == why_stream(tiny("bert"), False)
    monkeypatch.setattr("lamina.streaming.free_memory", lambda: 1000.0)
    assert "larger than half of the free memory" in why_stream(tiny("bert"), None)
    assert why_stream(torch.nn.Linear(2, 2), None) == ""


def test_long_layers_are_sampled_and_still_fit(
    tiny: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sampled, lamina.streaming.folder):
        monkeypatch.setattr(module, "SHORT", 1000)
    monkeypatch.setattr(sampled, "SAMPLE", 512)
    found = stream(tiny("llama"))
    size = found.report.facts["size"]
    assert 0.8 * size["limit"] < size["file"] <= size["limit"]
    assert any("sample of their rows" in note for note in found.report.facts["notes"])


def test_the_command_line_streams(tiny: Folder, tmp_path: Path) -> None:
    words = ["compress", str(tiny("llama")), "--size", "25%", "--stream", "--methods", "rdoq"]
    done = run_lamina(*words, "-o", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "net.lamina").read_bytes() == stream(tiny("llama")).file
    out = run_lamina("decompress", "run/net.lamina", "-o", "dense.safetensors", cwd=tmp_path)
    assert out.returncode == 0, out.stderr


MEMORY = """
import resource, sys, lamina, numpy, torch
from lamina.codecs import blocks
from transformers import LlamaForCausalLM
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
lamina.compress(sys.argv[2], None, '25%', methods=['rdoq'], stream=True)  # whatever is loaded once
blocks.encode_piece(numpy.random.default_rng(0).integers(-3, 4, (3000, 768)))  # as the largest
before = peak()
lamina.compress(sys.argv[1], None, '12%', stream=True).save(sys.argv[3])
print(peak() - before)
"""


def test_memory_is_that_of_a_layer(tiny: Folder, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=3000, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10MB")
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert size > 60e6 and len(list(folder.glob("*.safetensors"))) > 5
    words = [sys.executable, "-c", MEMORY, folder, tiny("llama"), tmp_path / "net.lamina"]
    done = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
    assert int(done.stdout.splitlines()[-1]) < 0.75 * size
    assert (tmp_path / "net.lamina").stat().st_size <= 0.12 * size
