"""Byte strings that must decode forever. Never rewritten: a change breaks files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamina import codecs

CASES = json.loads((Path(__file__).parent / "golden.json").read_text())
SMALL = [case for case in CASES if case["codec"] != "raw" and "hex" in case]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: f"{c['codec']}-{c['name']}")
@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_golden_symbols_decode_and_encode(case: dict[str, Any], backend: str) -> None:
    codec = codecs.get(case["codec"])
    data, shape = bytes.fromhex(case["hex"]), tuple(case["shape"])
    symbols = np.array(case["symbols"]).reshape(shape)
    np.testing.assert_array_equal(codec.decode(data, shape, backend=backend), symbols)
    assert codec.encode(symbols, backend=backend) == data


def test_golden_lanes() -> None:
    (case,) = (case for case in CASES if "sha256" in case)
    data = codecs.rans.encode(np.random.default_rng(0).integers(-3, 4, 40000))
    assert hashlib.sha256(data).hexdigest() == case["sha256"]


def test_golden_raw() -> None:
    (case,) = (case for case in CASES if case["codec"] == "raw")
    array = codecs.raw.decode(bytes.fromhex(case["hex"]), (3,), case["dtype"])
    assert array.dtype == np.float16
    assert array.tolist() == case["symbols"]
