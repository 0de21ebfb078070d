"""Hostile files with right checksums: each is a FileError, within bounded time and memory."""

from __future__ import annotations

import os
import sys

import pytest
from tests.attacks import hostile
from tests.attacks.confined import judge, judge_folder
from tests.attacks.files import seal, valid_files
from tests.attacks.fuzz import fuzz_one

from lamina.artifact import read, unpack
from lamina.errors import FileError
from lamina.opening import load

MAX_BYTES = 16 << 20
ALLOWED = 64 << 20  # beyond three times the file itself
CONFINED = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
LYING = hostile.lying_codes()


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What came of every hostile file in a process of little memory and time."""
    files = {name: build() for name, build in (hostile.ALL | LYING).items()}
    return judge(files, tmp_path_factory.mktemp("hostile"), MAX_BYTES, ALLOWED)


@CONFINED
@pytest.mark.parametrize("name", hostile.ALL)
def test_it_is_refused(verdicts, name):
    assert verdicts[name].startswith("FileError"), verdicts[name]


@CONFINED
@pytest.mark.parametrize("name", LYING)
def test_a_code_under_another_shape_does_no_harm(verdicts, name):
    """It may decode, as what it says now; it must not crash nor take more than that."""
    assert verdicts[name].startswith(("FileError", "accepted")), verdicts[name]


@CONFINED
def test_the_process_is_confined(tmp_path):
    """The judge itself: a valid file passes, a large one within the limit is out of memory."""
    large = seal({"tensors": "a:4096,4096"}, b"\x0b\0\0\x80\x3f\x50")
    files = {"valid": valid_files()["plain"], "large": large}
    found = judge(files, tmp_path, 256 << 20, 32 << 20)
    assert found["valid"] == "accepted"
    assert "FileError" not in found["large"] and found["large"] != "accepted"


def test_the_base_of_the_attacks_is_valid():
    """What the hostile manifests change one thing of is a file that opens."""
    assert fuzz_one(hostile.changed()()) == "accepted"
    assert fuzz_one(hostile.header()()) == "accepted"
    assert all(fuzz_one(data) == "accepted" for data in valid_files().values())


@pytest.mark.parametrize(
    "skeleton",
    [
        "python:os.py:system",
        "python:{here}/evil.py:build",
        "python:../evil.py:build",
        "python:",
        "pickle:x",
        "zoo:no-such-network",
        "zoo:",
        "zoo:../../etc/passwd",
        "zoo:__class__",
        "",
        "module",
        "http://example.org/x.py",
        "python:evil.py",
        "PYTHON:evil.py:build",
    ],
)
def test_a_factory_nobody_trusted_is_never_run(tmp_path, monkeypatch, skeleton):
    """The file that it names is there, and leaves a mark if it is ever imported."""
    mark = tmp_path / "imported"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n\n\ndef build():\n    pass\n")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.lamina"
    path.write_bytes(seal({"skeleton": skeleton.format(here=tmp_path)}))
    with pytest.raises(FileError):
        load(path)
    with pytest.raises(FileError):
        load(path, trust=("python:other.py:build",))
    assert not mark.exists()
    assert "evil" not in sys.modules


def test_odd_paths_are_refused(tmp_path):
    """A folder, a loop of links, a name with NUL, what is not there, what is no regular file."""
    loop = tmp_path / "loop.lamina"
    loop.symlink_to(loop)
    empty = tmp_path / "empty.lamina"
    empty.touch()
    for path in (tmp_path, loop, empty, tmp_path / "none", "a\0b", empty / "below", "x" * 5000):
        with pytest.raises(FileError):
            read(path)


@CONFINED
def test_what_has_no_end_is_refused(tmp_path):
    """A pipe nobody writes to would block for ever; a device that never ends would fill memory."""
    os.mkfifo(tmp_path / "0")
    (tmp_path / "1").symlink_to("/dev/zero")
    for verdict in judge_folder(tmp_path, MAX_BYTES, ALLOWED):
        assert verdict.startswith("FileError"), verdict


@pytest.mark.parametrize(
    "path", ["", "..", "fc.", ".fc", "fc..weight", "__class__", "_modules", "a/b", "a\0b"]
)
def test_an_edit_of_an_odd_path_changes_nothing(path):
    from torch import nn

    from lamina.artifact import restore

    net = nn.Sequential()
    net.fc = nn.Linear(3, 2)
    modules = {name: type(m) for name, m in net.named_modules()}
    with pytest.raises(FileError):
        data = seal({"edits": [[path, "low_rank", {"folds": 1, "rank": 1}]]})
        restore(unpack(data), net)
    assert {name: type(m) for name, m in net.named_modules()} == modules


def wide_net(width):
    from torch import nn

    return nn.Sequential(nn.Linear(width, width, bias=False))


@pytest.mark.parametrize("rank", [0, -1, 401, 1 << 20, 1 << 40, 1 << 63, 1 << 200])
@pytest.mark.parametrize("folds", [0, -1, 1, 3, 1 << 40])
def test_wild_integers_build_nothing(rank, folds):
    from lamina.artifact import restore

    data = seal({"edits": [["0", "low_rank", {"folds": folds, "rank": rank}]]})
    with pytest.raises(FileError):
        restore(unpack(data), wide_net(400))


@pytest.mark.parametrize("outputs", [0, -1, 33, 1 << 20, 1 << 40, 1 << 63, 1 << 200])
@pytest.mark.parametrize("inputs", [0, -1, 1, 3, 1 << 40])
def test_wild_ranks_build_nothing(outputs, inputs):
    from torch import nn

    from lamina.artifact import restore

    data = seal({"edits": [["0", "tucker", {"outputs": outputs, "inputs": inputs}]]})
    with pytest.raises(FileError):
        restore(unpack(data), nn.Sequential(nn.Conv2d(32, 32, 3)))


@pytest.mark.parametrize("value", [0, -1, 2, 1 << 20, 1 << 63, 1 << 200])
def test_wild_layouts_and_settings_of_none_build_nothing(value):
    from torch import nn

    from lamina.artifact import restore

    for edit in (
        ["", "layout", {"channels_last": value}], ["", "layout", {"channels_last": 1, "x": value}],
        ["0", "layout", {"channels_last": 1}], ["", "biased", {}], ["", "identity", {}],
        ["0", "biased", {"outputs": value}], ["1", "identity", {"x": value}],
        ["2", "biased", {}], ["0", "identity", {"x": value}],
    ):  # fmt: skip
        net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
        modules = list(net.modules())
        with pytest.raises(FileError):
            restore(unpack(seal({"edits": [edit]})), net)
        assert list(net.modules()) == modules


def test_edits_within_edits_do_not_grow():
    """Each would add a layer as large as the one before: a line of JSON for a megabyte."""
    import tracemalloc

    from lamina.artifact import restore

    paths = [".".join(["0"] + ["1"] * k) for k in range(200)]
    data = seal({"edits": [[path, "low_rank", {"folds": 1, "rank": 400}] for path in paths]})
    net = wide_net(400)
    before = sum(p.numel() for p in net.parameters())
    tracemalloc.start()
    with pytest.raises(FileError):
        restore(unpack(data), net)
    tracemalloc.stop()
    assert sum(p.numel() for p in net.parameters()) <= 4 * before
