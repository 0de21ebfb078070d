"""Bad input: exit code 2 and one line that says what, where, why and what to do."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.own import ENVIRONMENT, FAST, write_net
from torch import nn

import lamina
from lamina import cli
from lamina.errors import DataError, FileError, LaminaError

BAD = """

def not_a_network():
    return 3


def raising():
    raise ValueError("no weights\\nhere")


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return "four"


def returns_text():
    return Text(), (torch.zeros(1, 16),)


class Raises(Text):
    def forward(self, x):
        raise RuntimeError("not today")


def forward_raises():
    return Raises(), (torch.zeros(1, 16),)


def nan_weight():
    module, x = build()
    module[0].weight.data[3, 3] = float("nan")
    return module, x


def inf_weight():
    module, x = build()
    module[2].bias.data[0] = float("inf")
    return module, x


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.none = nn.Linear(16, 0)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x):
        return torch.cat([self.fc(x) * self.scale, self.none(x)], 1)


def odd():
    torch.manual_seed(0)
    return Odd(), (torch.zeros(1, 16),)


def other():
    torch.manual_seed(1)
    return nn.Linear(16, 4), (torch.zeros(1, 16),)


def no_batches():
    return []


def empty_batch():
    return [torch.zeros(0, 16)]


def nan_batch():
    return [torch.full((4, 16), float("nan"))]


def narrow():
    return [torch.zeros(8, 15)]


def fails_late():
    return [torch.zeros(8, 16), torch.zeros(8, 15)]


def nothing():
    return None


def calibration():
    return [torch.ones(8, 16)]


def nan_metric(module, loader):
    return float("nan")


def text_metric(module, loader):
    return "good"


def raising_metric(module, loader):
    raise ValueError("no metric today")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_net(tmp_path, BAD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """Run a command that must fail, check the promises, and return the line."""
    before = snapshot(Path.cwd())
    assert cli.main(words) == code, capsys.readouterr()
    shown = capsys.readouterr()
    assert shown.err.startswith("lamina: "), shown.err
    assert shown.err.count("\n") == 1, shown.err
    assert "Traceback" not in shown.err + shown.out
    assert snapshot(Path.cwd()) == before
    return shown.err.removeprefix("lamina: ").strip()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


DATA = ("--data", "net.py:loaders", "--size", "40%", "--samples", "64", *FAST)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nowhere.py:build", "no such file at nowhere.py; the form is file.py:function"),
        ("nowhere.lamina", "cannot read the file at nowhere.lamina: No such file"),
        ("lenet-6", "unknown network at 'lenet-6': the zoo has"),
        ("net.py:biuld", "no function 'biuld' at net.py: it has"),
        ("net.py", "no function is named at net.py"),
        ("net.py:not_a_network", "it returned a int; return an nn.Module"),
        ("net.py:raising", "ValueError: no weights"),
        ("net.py:returns_text", "the network returned no tensor at str"),
        ("net.py:forward_raises", "RuntimeError: not today"),
        ("net.py:nan_weight", "1 of 384 values are not finite at 0.weight (24, 16)"),
        ("net.py:inf_weight", "1 of 4 values are not finite at 2.bias (4,)"),
    ],
)
def test_bad_networks(
    place: Path, capsys: pytest.CaptureFixture[str], model: str, said: str
) -> None:
    assert said in refused(capsys, "compress", model, *DATA, "-o", "run")


@pytest.mark.parametrize("text", ["import nothing_like_this", "def build(:", "raise SystemExit(3)"])
def test_bad_files(place: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (place / "bad.py").write_text(text + "\n")
    assert "bad.py" in refused(capsys, "compress", "bad.py:build", *DATA, "-o", "run")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("nowhere.npz", "cannot open data at nowhere.npz: there is no such file"),
        ("mnist-11k", "unknown data at 'mnist-11k'; use mnist-10k"),
        ("net.py:nix", "no such function at net.py:nix"),
        ("net.py:raising", "ValueError: no weights"),
        ("net.py:nothing", "returned None"),
        ("net.py:no_batches", "no batches"),
        ("net.py:empty_batch", "empty batch"),
        ("net.py:nan_batch", "NaN or infinity in the data"),
        ("net.py:narrow", "15]"),
        ("net.py:fails_late", "15]"),
    ],
)
def test_bad_data(place: Path, capsys: pytest.CaptureFixture[str], data: str, said: str) -> None:
    words = ("--data", data, "--size", "40%", *FAST, "-o", "run")
    assert said in refused(capsys, "compress", "net.py:build", *words)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (("--size", "0"), "size='0'"),
        (("--size", "-3MB"), "size='-3MB'"),
        (("--size", "200%"), "at most 100%"),
        (("--size", "abc"), "size='abc'"),
        (("--size", "nan"), "size='nan'"),
        (("--macs", "-1"), "macs='-1'"),
        (("--max-drop", "-1"), "max_drop='-1'"),
        ((), "the budget is empty"),
        (("--size", "40%", "--recover", "-1"), "cannot read recover"),
        (("--size", "40%", "--recover", "inf"), "cannot read recover"),
        (("--size", "40%", "--recover", "maybe"), "cannot read recover at 'maybe'"),
        (("--size", "40%", "--methods", "rdoq,nix"), "unknown method at 'nix'; choose from"),
        (("--size", "40%", "--metric", "acuracy"), "unknown metric at 'acuracy'"),
        (("--max-drop", "1", "--data", "net.py:calibration"), "max_drop needs validation data"),
        (("--latency", "2x"), "'2x' of the original's time would be slower"),
    ],
)
def test_bad_settings(
    place: Path, capsys: pytest.CaptureFixture[str], budget: tuple[str, ...], said: str
) -> None:
    words = ("compress", "net.py:build", "--data", "net.py:loaders", *budget, "-o", "run")
    assert said in refused(capsys, *words)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nan_metric", "the metric is not a number at metric 'nan_metric': it returned nan"),
        ("text_metric", "the metric is not a number at metric 'text_metric'"),
        ("raising_metric", "ValueError: no metric today"),
        ("nix", "no function 'nix'"),
    ],
)
def test_bad_metrics(place: Path, capsys: pytest.CaptureFixture[str], name: str, said: str) -> None:
    words = ("compress", "net.py:build", *DATA, "--metric", f"net.py:{name}", "-o", "run")
    assert said in refused(capsys, *words)
    assert said in refused(
        capsys, "evaluate", "net.py:build", "--data", "net.py:loaders", "--metric", f"net.py:{name}"
    )


def test_scalars_and_empty_tensors_are_fine(place: Path) -> None:
    words = ("--data", "net.py:loaders", "--size", "90%", *FAST, "--samples", "64", "-o", "run")
    assert cli.main(["compress", "net.py:odd", *words]) in (0, 3)
    result = lamina.compress("net.py:odd", "net.py:loaders", 2000, recover=None)
    state = result.model.state_dict()
    assert state["scale"] == 2.0 and state["count"] == 3 and state["empty"].shape == (0, 4)


def test_a_budget_nobody_can_meet_is_code_3_with_the_nearest(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", "net.py:loaders", *FAST, "--samples", "64", "-o", "run")
    assert cli.main(["compress", "net.py:build", *words, "--size", "100"]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the nearest feasible budget is size=" in err
    assert not (place / "run" / "net.lamina").exists()
    nearest = err.rpartition("size=")[2].strip()
    assert cli.main(["compress", "net.py:build", *words, "--size", str(int(nearest) + 40)]) == 0
    assert (place / "run" / "net.lamina").stat().st_size <= int(nearest) + 40


def made_plan(place: Path) -> Path:
    words = ("plan", "net.py:build", "--data", "net.py:loaders", "--size", "40%")
    assert cli.main([*words, "--methods", "rdoq", "--samples", "64"]) == 0
    return place / "plan.json"


def test_bad_plans(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made_plan(place)
    document = json.loads(path.read_text())
    capsys.readouterr()

    def wrong(change: Callable[[dict[str, object]], object]) -> str:
        altered = json.loads(json.dumps(document))
        change(altered)
        (place / "wrong.json").write_text(json.dumps(altered))
        words = ("net.py:build", "wrong.json", "--data", "net.py:loaders")
        assert refused(capsys, "apply", *words, "-o", "net.lamina")
        return refused(capsys, "recover", *words, "-o", "run")

    assert "made for another network" in wrong(lambda d: d.update(network="0" * 16))
    assert "lamina_plan" in wrong(lambda d: d.update(lamina_plan=2))
    assert "unknown method" in wrong(lambda d: d["sites"]["0"]["steps"][0].update(method="nix"))  # type: ignore[index]
    assert "a site that the network does not have" in wrong(
        lambda d: d["sites"].update(fc=d["sites"]["0"])  # type: ignore[attr-defined, index]
    )
    assert "sites" in wrong(lambda d: d.pop("sites"))
    words = ("--data", "net.py:loaders", "-o", "net.lamina")
    said = refused(capsys, "apply", "net.py:other", "plan.json", *words)
    assert "the plan was made for another network" in said and "plan again" in said
    (place / "plan.json").write_text("{'a': 1}")
    assert "the plan is not JSON" in refused(capsys, "apply", "net.py:build", "plan.json", *words)
    assert "No such file" in refused(capsys, "apply", "net.py:build", "nix.json", *words)


def test_a_damaged_file_is_an_error_wherever_it_is_cut(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = lamina.compress(nn.Linear(16, 8), [torch.randn(32, 16)], 400, recover=None)
    whole = result.file
    path = place / "cut.lamina"
    for i in range(16):
        path.write_bytes(whole[: len(whole) * i // 16])
        assert "cut.lamina" in refused(capsys, "decompress", "cut.lamina", "-o", "out.safetensors")
        damaged = bytearray(whole)
        damaged[len(whole) * i // 16] ^= 0x55
        path.write_bytes(damaged)
        assert "cut.lamina" in refused(capsys, "inspect", "cut.lamina")
        with pytest.raises(FileError):
            lamina.load(path, skeleton=nn.Linear(16, 8))
    path.write_bytes(whole)
    assert cli.main(["inspect", "cut.lamina"]) == 0


def test_a_full_disk_leaves_the_old_file_whole(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lamina.save(nn.Linear(4, 2), place / "net.lamina")
    (place / "out.safetensors").write_bytes(b"old")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    said = refused(capsys, "decompress", "net.lamina", "-o", "out.safetensors")
    assert said.startswith("cannot write at out.safetensors: No space left on device")
    assert "No space left" in refused(capsys, "compress", "net.py:build", *DATA, "-o", "deep/run")


def test_run_folders_that_cannot_be_used(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compress", "net.py:build", *DATA, "-o")
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").touch()
    assert "holds other things at full" in refused(capsys, *words, "full")
    assert "the run folder is a file at net.py" in refused(capsys, *words, "net.py")
    code = (
        "import sys; from lamina.run import open_run\n"
        "with open_run('busy'): print('up', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with other:
        assert other.stdout is not None and other.stdout.readline() == "up\n"
        said = refused(capsys, *words, "busy")
        assert said.startswith("the run folder is in use by another process at busy")
        other.kill()
    assert cli.main([*words, "busy"]) == 0


def test_the_library_says_the_same() -> None:
    net = nn.Linear(4, 2)
    with pytest.raises(LaminaError, match="unknown method"):
        lamina.compress(net, [torch.zeros(8, 4)], "50%", methods=["nix"])
    with pytest.raises(DataError, match="it returned nan"):
        lamina.compress(
            net, {"train": [torch.zeros(8, 4)], "validation": [torch.zeros(8, 4)]}, "50%",
            metric=lambda module, loader: float("nan"), recover=None,
        )  # fmt: skip
