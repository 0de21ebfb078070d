"""Damage by chance: cuts and flipped bits, with the checksum as it was and mended."""

from __future__ import annotations

import struct
from random import Random

import pytest
from tests.attacks.files import mend, open_up, seal, valid_files
from tests.attacks.fuzz import fuzz_one

from lamina.artifact import unpack
from lamina.errors import FileError

FILES = valid_files()
SMALL = [name for name, data in FILES.items() if len(data) < 2500]


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused(name):
    data = FILES[name]
    for part in range(64):
        assert fuzz_one(data[: len(data) * part // 64]) == "refused"
    assert fuzz_one(data[:-1]) == "refused"


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_with_a_right_checksum_is_refused(name):
    """The header says how long the data are, and each record how long it is."""
    data = FILES[name]
    for part in range(1, 64):
        assert fuzz_one(mend(data[: (len(data) - 4) * part // 64])) == "refused"


@pytest.mark.parametrize("name", FILES)
def test_a_record_cut_anywhere_does_no_harm(name):
    """The rest of the file is made to fit; only the codec can see it, and need not."""
    manifest, bodies = open_up(FILES[name])
    at = max(range(len(bodies)), key=lambda i: len(bodies[i]))
    for part in range(64):
        cut = bodies[at][: len(bodies[at]) * part // 64]
        fuzz_one(seal(manifest, *bodies[:at], cut, *bodies[at + 1 :]))


@pytest.mark.parametrize("name", SMALL)
def test_every_flipped_bit_is_seen(name):
    data = FILES[name]
    for at in range(len(data)):
        wrong = bytearray(data)
        wrong[at] ^= 1 << at % 8
        with pytest.raises(FileError):
            unpack(bytes(wrong))


@pytest.mark.parametrize("name", SMALL)
def test_no_flipped_bit_does_harm_under_a_right_checksum(name):
    random, data = Random(0), FILES[name]
    for _ in range(200):
        wrong = bytearray(data[:-4])
        wrong[random.randrange(len(wrong))] ^= 1 << random.randrange(8)
        fuzz_one(mend(bytes(wrong)))


@pytest.mark.parametrize("name", SMALL)
def test_no_flipped_bit_of_a_record_does_harm(name):
    """Most of a small file is header: here all flips are in what the codecs read."""
    random, data = Random(1), FILES[name]
    (length,) = struct.unpack("<Q", data[:8])
    for _ in range(200):
        wrong = bytearray(data[:-4])
        if len(wrong) > 8 + length:
            wrong[random.randrange(8 + length, len(wrong))] ^= 1 << random.randrange(8)
        fuzz_one(mend(bytes(wrong)))


def test_bytes_of_another_file_do_no_harm():
    random, files = Random(2), list(FILES.values())
    for _ in range(300):
        a, b = random.choice(files), random.choice(files)
        cut = random.randrange(len(a))
        fuzz_one(mend(a[:cut] + b[min(cut, len(b) - 4) : -4]))
