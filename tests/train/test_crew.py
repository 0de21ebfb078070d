"""Two real processes on gloo: the same bits on both, near what one process trains."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.own import write_net
from tests.train.small import make_data
from tests.train.two import LIMIT, SETTINGS, plain_network, state_of

from lamina.errors import RunError
from lamina.measure.forward import Batch
from lamina.train import recover
from lamina.train.crew import led, process_number, shares, weight_of

ROOT = Path(__file__).parents[2]
gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)
# Sums of 16 and of 32 samples differ in their last bits, and Adam's first steps magnify that.
NEAR = 2e-3


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script or a module on two processes of this machine."""
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1",
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }  # fmt: skip
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        environment.pop(name, None)
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", *words)  # fmt: skip
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes of `two.py` found, by rank."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(folder, str(Path(__file__).with_name("two.py")), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@gloo
def test_both_processes_end_with_the_same_bits(found: list[dict[str, Any]]) -> None:
    first, second = found
    assert first["count"] == second["count"] == 2
    for name in ("state", "single", "normed", "again"):
        assert same(first[name], second[name]), name
    assert first["history"] == second["history"]


@gloo
def test_it_is_the_training_of_one_process(found: list[dict[str, Any]]) -> None:
    network, edited = plain_network()
    alone = recover(network, edited, make_data(), SETTINGS, limit=LIMIT)
    assert alone.steps == 24  # 4 epochs of 12 batches, two to a step
    one, two = alone.history, found[0]["history"]
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= NEAR * max(1.0, a["loss"])
    # Rounded to a grid, nearly all weights come out as the very same integers.
    for name, tensor in state_of(alone).items():
        other = found[0]["state"][name]
        close = (tensor - other).abs() <= NEAR * tensor.abs().max()
        assert float(close.float().mean()) > 0.97, name
    moved = [not torch.equal(t, edited.model.state_dict()[n]) for n, t in state_of(alone).items()]
    assert all(moved)


@gloo
def test_a_stopped_training_goes_on_to_the_same_bits(found: list[dict[str, Any]]) -> None:
    for part in found:
        assert part["kept"]
        assert same(part["again"], part["normed"])
    assert [part["stopped"] for part in found] == ["KeyError", "RunError"]


@gloo
def test_what_fails_on_one_process_ends_all(found: list[dict[str, Any]]) -> None:
    for rank, part in enumerate(found):
        assert part["failed"].startswith("RunError"), part["failed"]
        assert ("a label is no class" in part["failed"]) is (rank == 0)


@gloo
def test_one_process_leads_and_the_other_helps(found: list[dict[str, Any]]) -> None:
    first, second = (part["led"] for part in found)
    assert first["rank"] == second["rank"] == 0  # it ran once
    assert same(first["state"], second["state"])


@gloo
def test_the_command_line_runs_on_two_processes(tmp_path: Path) -> None:
    write_net(tmp_path)
    command = ("compress", "net.py:build", "--data", "net.py:loaders", "--size", "25%",
               "--methods", "rdoq", "--samples", "64",
               "--recover", "epochs=2,accumulate=2")  # fmt: skip
    done = launch(tmp_path, "-m", "lamina", *command, "-o", "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("net.lamina") == 1  # the first one alone speaks
    cli = importlib.import_module("lamina.cli")
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        assert cli.main([*command, "-o", "one"]) == 0
    finally:
        os.chdir(here)
    one, two = ((tmp_path / run / "net.lamina").stat().st_size for run in ("one", "two"))
    assert abs(one - two) <= 0.05 * one
    assert not list((tmp_path / "two").glob("**/.*.part"))


def test_a_batch_is_shared_out_whole() -> None:
    mask = torch.ones(5, 4, dtype=torch.long)
    batch = Batch((), {"x": torch.arange(5), "attention_mask": mask, "scale": torch.ones(2)},
                  torch.arange(5), 5)  # fmt: skip
    parts = shares(batch, 3)
    assert [p.size for p in parts if p] == [2, 2, 1]
    assert torch.cat([p.kwargs["x"] for p in parts if p]).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([p.labels for p in parts if p]).tolist() == [0, 1, 2, 3, 4]
    assert all(p and p.kwargs["scale"].shape == (2,) for p in parts)
    assert sum(weight_of(p) for p in parts if p) == weight_of(batch) == 20
    few = shares(Batch((torch.zeros(1, 2),), {}, None, 1), 3)
    assert few[0] is not None and few[1:] == [None, None]
    assert weight_of(few[0]) == 1


def test_one_process_is_just_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_number() == (0, 1)
    assert led(lambda x: x + 1)(2) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert process_number() == (1, 2)
    from accelerate import PartialState

    PartialState()  # is there already, for one process: nobody to be found
    with pytest.raises(RunError, match="cannot find each other"):
        led(lambda: None)()
