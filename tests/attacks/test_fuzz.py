"""A short run of the fuzz target; benchmarks/fuzz has the long one. And that it would find."""

from __future__ import annotations

from random import Random
from unittest import mock

import pytest
from tests.attacks import fuzz
from tests.attacks.files import mend, seal, valid_files
from tests.attacks.mutate import mutate

from lamina.artifact import streams
from lamina.errors import FileError

CASES = 500


@pytest.mark.parametrize("seed", [0, 1])
def test_a_short_run_finds_nothing(seed):
    findings, coverage, counts = fuzz.search(valid_files(), CASES, seed, uncompiled=0.01)
    assert not findings, [finding.error for finding in findings]
    assert counts["accepted"] + counts["refused"] == CASES
    assert min(counts["accepted"], counts["refused"], counts["kept"]) > 10
    assert len(coverage.seen) > 500


def test_the_same_seed_gives_the_same_files():
    files = list(valid_files().values())
    runs = [[mutate(files[i % 9], files[i % 7], Random(i)) for i in range(200)] for _ in range(2)]
    assert runs[0] == runs[1]
    changed = sum(data != files[i % 9] for i, data in enumerate(runs[0]))
    assert changed > 180, "nearly all differ from the file they come from"


def broken(symptom):
    """A reader that fails when it meets a codebook, in the way that is told."""

    intact = streams.fill

    def fill(record, memory):
        if record.form != "codebook":
            return intact(record, memory)
        if symptom == "crash":
            raise IndexError("list index out of range")
        memory[:] = 1  # a wrong tensor
        return []

    return mock.patch.object(streams, "fill", fill)


@pytest.mark.parametrize("symptom", ["crash", "wrong values"])
def test_a_broken_reader_is_found(symptom):
    seeds = {"codebook": valid_files()["codebook"], "plain": valid_files()["plain"]}
    with broken(symptom):
        with pytest.raises((IndexError, AssertionError)):
            fuzz.fuzz_one(seeds["codebook"])
        assert fuzz.fuzz_one(seeds["plain"]) == "accepted"


def test_a_finding_is_kept_with_its_bytes():
    seeds = {"plain": valid_files()["plain"]}

    def target(data):
        if data != seeds["plain"]:
            raise KeyError("a bug")
        return "accepted"

    with mock.patch.object(fuzz, "fuzz_one", target):
        findings, _, _ = fuzz.search(seeds, 20)
    (finding,) = findings
    assert "KeyError" in finding.error
    assert finding.data != seeds["plain"]


def test_a_case_without_end_is_a_finding():
    def target(data):
        while data != b"never":
            pass

    with pytest.raises(TimeoutError), fuzz.deadline(0.05):
        target(b"")


def test_the_target_sees_a_checksum_that_is_not_checked():
    data = bytearray(valid_files()["plain"])
    data[-1] ^= 1
    with pytest.raises(FileError):
        fuzz.unpack(bytes(data))
    package = fuzz.unpack(mend(bytes(data[:-4])))
    with pytest.raises(AssertionError, match="checksum"):
        fuzz.check(bytes(data), package, package.state())


def test_the_skeleton_fits_a_file_of_edits():
    assert fuzz.fuzz_one(valid_files()["all"]) == "accepted"
    package = fuzz.unpack(valid_files()["all"])
    loaded = fuzz.restore(package, fuzz.skeleton_for(package.state()))
    assert "fc.1.bias" in dict(loaded.named_parameters())
    assert fuzz.fuzz_one(seal({})) == "accepted"
