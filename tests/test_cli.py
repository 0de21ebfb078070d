"""The command line: verbs, exit codes, one line for an error, help that teaches."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.own import FAST, run_lamina, start_lamina, write_net

from lamina import cli, cli_options, cli_show
from lamina.compress import load
from lamina.errors import InfeasibleError, MethodError

VERBS = (
    *("inspect", "compress", "plan", "apply", "recover", "evaluate", "report", "export", "bench"),
    *("methods", "decompress"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.py and a finished run of it in `run`."""
    folder = tmp_path_factory.mktemp("cli")
    write_net(folder)
    done = run_lamina(
        *("compress", "net.py:build", "--data", "net.py:loaders", "--size", "30%"),
        *(*FAST, "--samples", "64", "-o", "run"), cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (folder / "out.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def test_compress_fills_the_run_folder_and_prints_the_report(place: Path) -> None:
    made = {p.name for p in (place / "run").iterdir()}
    assert {"net.lamina", "plan.json", "report.json", "report.md", "report.html"} <= made
    printed = (place / "out.txt").read_text(encoding="utf-8")
    facts = json.loads((place / "run" / "report.json").read_text(encoding="utf-8"))
    size = (place / "run" / "net.lamina").stat().st_size
    assert facts["size"]["file"] == size
    assert sum(row["bytes"] for row in facts["ledger"]) == size
    assert size <= 0.3 * facts["size"]["original"]
    assert f"{size:,}" in printed
    assert "run/net.lamina" in printed.replace("\\", "/")
    for stage in ("discover", "measure", "propose", "plan", "pack"):
        assert re.search(rf"^{stage} +\d", printed, re.MULTILINE), stage


def lamina(place: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.chdir(place)
    return cli.main(words)


def test_report_prints_the_table_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lamina(place, monkeypatch, "report", "run", "--html", "page.html") == 0
    table = capsys.readouterr().out.split("\nreport:")[0].strip()
    assert table in (place / "out.txt").read_text(encoding="utf-8")
    assert (place / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_inspect_shows_sites(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lamina(place, monkeypatch, "inspect", "net.py:build") == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("0 "))
    assert "linear" in row and "24x16" in row and "384" in row and "rdoq" in row
    assert any("2 layers" in line for line in lines)


SPANS = """
import torch
from torch import nn
from lamina.network.source import Network
def build():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Flatten(0, 0), nn.Linear(8, 2)]
    return Network(nn.Sequential(*layers), (torch.zeros(2, 8),))
"""


def test_inspect_shows_chains_families_and_who_takes_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "spans.py").write_text(SPANS)
    assert lamina(place, monkeypatch, "inspect", "spans.py:build") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line and not line.startswith("refused")}
    assert re.search(r"chain +layer_collapse +0, 1, 2$", rows["0..2"])
    assert re.search(r"family +layer_fusion +0, 2, each 8 x 8$", rows["*"])
    assert any("3 layers, 1 chains, 1 families" in line for line in lines)


def test_inspect_shows_a_files_ledger_without_building_the_network(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "alone").mkdir(exist_ok=True)
    (place / "alone" / "x.lamina").write_bytes((place / "run" / "net.lamina").read_bytes())
    assert lamina(place / "alone", monkeypatch, "inspect", "x.lamina") == 0
    out = capsys.readouterr().out
    size = (place / "alone" / "x.lamina").stat().st_size
    assert re.search(rf"total +{size:,} +[\d.]+ +100.0%\n", out)
    assert "python:net.py:build" in out
    head = ["tensor", "shape", "form", "codec", "bytes", "bits/weight", "share"]
    assert out.splitlines()[0].split() == head


def test_inspect_tells_of_every_tensor_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every number is in the line of its tensor; they add up to the file; nothing is decoded."""
    from lamina.artifact import pack, streams
    from lamina.forms import Edit, Grid

    net = torch.nn.Module()
    net.register_buffer("grid", torch.zeros(40, 50))
    net.register_buffer("scalar", torch.tensor(2, dtype=torch.int64))
    net.register_buffer("none", torch.zeros(0, 3))
    grid = Grid(torch.arange(2000).reshape(40, 50) % 7 - 3, 0.5)
    path = tmp_path / "x.lamina"
    path.write_bytes(pack(net, (Edit("grid", "values", values=grid),), "module", {}))
    monkeypatch.setattr(streams, "fill", None)
    monkeypatch.setattr(streams, "decode", None)
    assert lamina(tmp_path, monkeypatch, "inspect", "x.lamina") == 0
    table, _ = capsys.readouterr().out.split("\n\n")
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    assert list(rows) == ["header", "checksum", "grid", "scalar", "none", "total"]
    shape, form, codec, taken, bits, share = rows["grid"]
    assert (shape, form) == ("40x50", "grid") and codec in ("rans", "adaptive", "context")
    assert float(bits) == pytest.approx(8 * int(taken) / 2000, abs=1e-3)
    size = path.stat().st_size
    assert share == f"{100 * int(taken) / size:.1f}%"
    assert rows["scalar"][:2] == ["scalar", "plain"] and rows["none"][0] == "0x3"
    assert rows["total"] == [f"{size}", f"{8 * size / 2001:.3f}", "100.0%"]
    sizes = [int(rows[part][0]) for part in ("header", "checksum")]
    sizes += [int(rows[part][3]) for part in ("grid", "scalar", "none")]
    assert sum(sizes) == size


def test_evaluate_a_file_of_ones_own_network(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("run/net.lamina", "--data", "net.py:loaders", "--skeleton", "net.py:build")
    assert lamina(place, monkeypatch, "evaluate", *words, "--split", "validation") == 0
    facts = json.loads((place / "run" / "report.json").read_text(encoding="utf-8"))
    after = facts["quality"]["validation"]["after"]
    assert capsys.readouterr().out == f"accuracy {after:.4f} points (validation)\n"
    assert lamina(place, monkeypatch, "evaluate", *words, "--metric", "kl") == 0
    assert 0 < float(capsys.readouterr().out.split()[1]) < 1


def test_evaluate_with_a_metric_of_ones_own(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "own_metric.py").write_text("def score(module, loader):\n    return 12.5\n")
    words = ("net.py:build", "--data", "net.py:loaders", "--metric", "own_metric.py:score")
    assert lamina(place, monkeypatch, "evaluate", *words) == 0
    assert capsys.readouterr().out == "score 12.5000 points (test)\n"


def test_plan_then_apply_gives_the_file_of_compress(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("net.py:build", "--data", "net.py:loaders", "--samples", "64")
    code = lamina(
        place, monkeypatch, "plan", *words, "--size", "30%", "--methods", "rdoq", "-o", "p.json"
    )
    assert code == 0
    assert (
        lamina(place, monkeypatch, "apply", "net.py:build", "p.json", *words[1:], "-o", "a.lamina")
        == 0
    )
    assert (place / "a.lamina").read_bytes() == (place / "run" / "net.lamina").read_bytes()


QUICK = ("--samples", "64", "--methods", "rdoq,kmeans")
DATA = ("net.py:build", "--data", "net.py:loaders")


def test_plan_explains_a_layer_and_measures_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("plan", *DATA, *QUICK, "--size", "40%", "--run", "why", "-o", "why.json")
    assert lamina(place, monkeypatch, *words, "--explain", "2") == 0
    out = capsys.readouterr().out
    assert "2: linear 4 x 24\ntakes " in out
    assert re.search(r"^Price at this budget: [\d.e-]+ nats per byte\.$", out, re.MULTILINE)
    for chain in ("keep", "kmeans", "rdoq"):
        assert re.search(rf"^{chain} +\d+ ", out, re.MULTILINE), chain
    assert len(re.findall(r"^\* ", out, re.MULTILINE)) == 1
    made = json.loads((place / "why.json").read_text(encoding="utf-8"))
    step = made["sites"]["2"]["steps"][0]
    assert f"takes {step['method']}(" in out
    assert lamina(place, monkeypatch, *words, "--explain", "all") == 0
    again = capsys.readouterr().out
    assert re.search("^measure +done before$", again, re.MULTILINE)
    assert re.search("^propose +done before$", again, re.MULTILINE)
    assert [line.split()[0] for line in again.splitlines() if " takes " in line] == [
        "layer", "0", "2",
    ]  # fmt: skip


def test_a_finished_run_is_explained_without_a_budget(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("plan", *DATA, "--samples", "64", "--methods", "rdoq", "--run", "run", "-o", "no.json")
    assert lamina(place, monkeypatch, *words, "--explain", "0") == 0
    out = capsys.readouterr().out
    assert re.search("^propose +done before$", out, re.MULTILINE)
    made = json.loads((place / "run" / "plan.json").read_text(encoding="utf-8"))
    step = made["sites"]["0"]["steps"][0]["settings"]["step"]
    assert f"takes rdoq(step={step:.4g}" in out
    assert lamina(place, monkeypatch, *words) == 0
    assert "x smaller), predicted error" in capsys.readouterr().out
    assert not (place / "no.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "30%", "--explain", "fc1"], "the layers are 0, 2"),
        (["--size", "30%", "--explain", "2.weight"], "did you mean '2'?"),
        (["--explain", "0"], "the budget is empty"),
        (["--run", "nowhere", "--explain", "0"], "cannot read the plan"),
        (["--size", "30%", "--run", "."], "it is not a run folder"),
    ],
)
def test_what_cannot_be_explained_is_code_2(
    words: list[str], said: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert lamina(place, monkeypatch, "plan", *DATA, *QUICK, *words, "-o", "never.json") == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1
    assert not (place / "never.json").exists()


def test_the_report_of_a_run_shows_why(place: Path) -> None:
    facts = json.loads((place / "run" / "report.json").read_text(encoding="utf-8"))
    assert list(facts["curves"]) == ["0", "2"]
    for site in facts["sites"]:
        (taken,) = [p for p in facts["curves"][site["site"]] if p["taken"]]
        assert taken["steps"] == site["chain"]
    assert facts["prices"]["bytes"] > 0
    printed = (place / "out.txt").read_text(encoding="utf-8")
    assert "What each layer could have been" in printed
    page = (place / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<details") == 2 and page.count('class="mark taken"') >= 2


def test_limits_go_together(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ("--size", "60%", "--macs", "90%", "--params", "90%", "--max-drop", "30")
    words = ("plan", *DATA, "--samples", "64", "--methods", "alds,rdoq", *limits, "-o", "l.json")
    assert lamina(place, monkeypatch, *words) == 0
    made = json.loads((place / "l.json").read_text(encoding="utf-8"))
    assert set(made["budget"]) == {"size", "macs", "params", "max_drop"}
    share = {"bits": 0.6, "macs": 0.9, "params": 0.9}
    for name, most in share.items():
        assert made["predicted"][name] <= most * made["original"][name]
    for verb in ("plan", "compress"):
        assert cli.main([verb, "--help"]) == 0
        page = capsys.readouterr().out
        assert all(
            f"--{name} " in page for name in ("size", "macs", "params", "latency", "max-drop")
        )


def test_recover_trains_a_plan(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("net.py:build", "run/plan.json", "--data", "net.py:loaders", "--samples", "64")
    assert lamina(place, monkeypatch, "recover", *words, "--epochs", "6", "-o", "run3") == 0
    facts = json.loads((place / "run3" / "report.json").read_text(encoding="utf-8"))
    assert facts["recovery"]["steps"] == 48  # 512 samples in batches of 64, six times
    assert facts["size"]["file"] <= facts["size"]["limit"]


def test_decompress_and_export_write_the_dense_tensors(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    assert lamina(place, monkeypatch, "decompress", "run/net.lamina", "-o", "d.safetensors") == 0
    export = ("export", "run/net.lamina", "--to", "safetensors", "-o", "e.safetensors")
    assert lamina(place, monkeypatch, *export) == 0
    state = load(place / "run" / "net.lamina", skeleton=build(place)).state_dict()
    assert lamina(place, monkeypatch, "decompress", "run/net.lamina", "-o", "d.pt") == 0
    for name in ("d.safetensors", "e.safetensors", "d.pt"):
        path = place / name
        found = torch.load(path, weights_only=True) if name == "d.pt" else load_file(path)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_export_writes_onnx_and_refuses_a_folder_of_transformers(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    words = ("export", "run/net.lamina", "--to", "onnx", "-o", "n.onnx")
    assert lamina(place, monkeypatch, *words, "--skeleton", "net.py:build") == 0
    assert "checked  in onnxruntime" in capsys.readouterr().out
    assert (place / "n.onnx").stat().st_size > 1000
    assert lamina(place, monkeypatch, *words[:3], "hf", "-o", "folder") == 2
    said = capsys.readouterr().err
    assert "not a network of transformers" in said and said.count("\n") == 1
    assert not (place / "folder").exists()


def build(place: Path) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("own_net", place / "net.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build()[0]  # type: ignore[no-any-return]


def test_bench_times_both(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("bench", "run/net.lamina", "--skeleton", "net.py:build")
    assert lamina(place, monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert re.search(r"before +\d+\.\d+ ms\nafter +\d+\.\d+ ms\n", out), out
    words = ("bench", "net.py:build", "run/net.lamina", "--skeleton", "net.py:build", "--batch",
             "3", "--seconds", "0.01", "--layers", "--json", "bench.json")  # fmt: skip
    assert lamina(place, monkeypatch, *words) == 0
    assert re.search(r"x the speed .* batch 3, 1 thread", capsys.readouterr().out)
    found = json.loads((place / "bench.json").read_text())
    assert found["batch"] == 3 and found["layers"] and found["original"] == "net.py:build"


def test_methods_lists_cards_and_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in ("alds", "keep", "kmeans", "layer_collapse", "magnitude", "rdoq"):
        assert re.search(rf"^{name} +\d ", out, re.MULTILINE), name
    assert "arXiv:2107.11442" in out
    assert cli.main(["methods", "alds"]) == 0
    card = capsys.readouterr().out
    assert card.startswith("alds: ") and "**Does not help**" in card
    assert cli.main(["methods", "layer_fusion"]) == 0
    assert capsys.readouterr().out.startswith("layer_fusion: ")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    from lamina._version import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lamina {__version__}\n"
    assert cli.main([]) == cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "lamina compress lenet-5 --data mnist-10k --size 2%" in out
    assert all(re.search(rf"^  {verb} ", out, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"\n  Examples:\n    lamina {verb}" in out
    assert "..." not in next(
        line for line in help_page(capsys).splitlines() if line.startswith(f"  {verb} ")
    )  # the summary fits its line


def help_page(capsys: pytest.CaptureFixture[str]) -> str:
    cli.main(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compres"], "No such command 'compres'"),
        (["compress"], "Missing argument"),
        (["compress", "lenet-5", "--sise", "2%"], "No such option"),
        (["compress", "lenet-5", "--seed", "x"], "Invalid value for '--seed'"),
        (["plan", "lenet-5", "--samples", "0"], "Invalid value for '--samples'"),
        (["methods", "nix"], "unknown method"),
        (["export", "x.lamina", "--to", "gguf", "-o", "x.gguf"], "there are safetensors, pt, hf"),
        (["report", "nowhere"], "nowhere"),
        (["compress", "lenet-5", "--recipe", "nix"], "unknown recipe at 'nix'; choose from "),
        (["compress", "lenet-5", "--recipe", "nix", "--set", "a=1"], "unknown recipe at 'nix'"),
        (["compress", "lenet-5", "--size", "2%", "--set", "a=1"], "--set needs a recipe at a=1"),
        (["compress", "lenet-5", "--recipe", "weightless", "--set", "a"], "write NAME=VALUE"),
        (["decompress", "x.lamina"], "Missing option '-o'"),
        (["decompress", "x.lamina", "-o", "x.npz"], "end in .safetensors or .pt"),
        (["decompress", "x.lamina", "-o", "x.pt"], "cannot read the file at x.lamina"),
        (["decompress", "x.lamina", "-o", "."], "it is a folder"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("lamina: ") and shown.err.count("\n") == 1
    assert said in shown.err
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_our_own_leaves_a_traceback_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by zero\nand a second line")

    monkeypatch.setattr(cli_show, "show_methods", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main(["methods"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "ZeroDivisionError: by zero;" in err and "please report it" in err
    (file,) = tmp_path.iterdir()
    assert str(file) in err
    assert "Traceback" in file.read_text(encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        cli.main(["--debug", "methods"])


def test_an_infeasible_budget_is_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_show.explain(InfeasibleError("no plan fits", nearest={"bytes": 9.0})) == 3
    assert capsys.readouterr().err == "lamina: no plan fits\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    write_net(tmp_path, "\n\ndef slow():\n    import time\n    print('up', flush=True)\n"
                        "    time.sleep(60)\n")  # fmt: skip
    words = ("compress", "net.py:build", "--data", "net.py:slow", "--size", "30%", "-o", "run")
    with start_lamina(*words, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == "lamina: interrupted; the same command continues the run in run\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes to break")
def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    with start_lamina("methods", "alds", cwd=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert "Traceback" not in err and "fault" not in err


def test_run_names_are_made_of_model_and_budget() -> None:
    assert cli_show.slug("a b/net.lamina", {"macs": "50%", "max_drop": 0.3}) == (
        "net-macs-50pct-max_drop-0.3"
    )


@pytest.mark.parametrize(
    ("given", "path", "value"),
    [
        (["pruning.density=0.05"], "pruning.density", 0.05),
        (["bits.fc1=6", "bits.fc2=5"], "bits", {"fc1": 6, "fc2": 5}),
        (["bits.block.0.fc1=6"], "bits", {"block.0.fc1": 6}),
        (["start=exact"], "start", "exact"),
        (['start="exact"', "epochs=3"], "epochs", 3),
        (['pruning.keep={"conv": 0.5}'], "pruning.keep", {"conv": 0.5}),
    ],
)
def test_settings_of_a_recipe(given: list[str], path: str, value: object) -> None:
    found = cli_options.read_recipe("deep-compression", given)
    for name in path.split("."):
        found = getattr(found, name)
    if isinstance(value, dict):
        assert value.items() <= found.items()
    else:
        assert found == value
    assert cli_options.read_recipe("deep-compression", None) == "deep-compression"
    assert cli_options.read_recipe("low-rank", ['exclude=["fc*"]']).exclude == ("fc*",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("density=0.05", "there are pruning, bits, start"),
        ("pruning.nix=1", "there are density, keep"),
        ("pruning=0.05", "it holds others; pruning.NAME=VALUE"),
        ("epochs.x=1", "it is a single value"),
        ("bits.fc1=ten", "bits is a whole number"),
        ("start=middle", "unknown start"),
        ("lr=fast", "a learning rate is over 0"),
    ],
)
def test_settings_that_cannot_be_used(given: str, said: str) -> None:
    with pytest.raises(MethodError, match=re.escape(said)):
        cli_options.read_recipe("deep-compression", [given])
