"""Byte strings that must decode forever. Never rewritten: a change breaks files.

`symbols` is what a code decodes to. How it was made, where not by `encode(symbols)`: `given` are
the symbols that were coded (of a lossy code), `arguments` those of `encode`, and `layout` says
which way of `context` was forced: its number, across or not, the class of each row (or column).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamina import codecs
from lamina.codecs import context

CASES = json.loads((Path(__file__).parent / "golden.json").read_text())
SMALL = [case for case in CASES if case["codec"] != "raw" and "hex" in case]
LONG = [case for case in CASES if "sha256" in case]


def encode(case: dict[str, Any], symbols: np.ndarray, backend: str) -> bytes:
    if "layout" in case:
        way, across, classes = case["layout"]
        grid = symbols.reshape(len(symbols), -1)
        low, high = int(grid.min()), int(grid.max())
        layout = context.Layout(way, across, np.array(classes), low, high - low + 1)
        turned = np.ascontiguousarray(grid.T if across else grid)
        return context._encode_rows(turned.astype(np.int32), layout, backend)
    arguments = case.get("arguments", {})
    return codecs.get(case["codec"]).encode(symbols, backend=backend, **arguments)


@pytest.mark.parametrize("case", SMALL, ids=lambda c: f"{c['codec']}-{c['name']}")
@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_golden_symbols_decode_and_encode(case: dict[str, Any], backend: str) -> None:
    codec = codecs.get(case["codec"])
    data, shape = bytes.fromhex(case["hex"]), tuple(case["shape"])
    symbols = np.array(case["symbols"], dtype=np.int64).reshape(shape)
    np.testing.assert_array_equal(codec.decode(data, shape, backend=backend), symbols)
    given = np.array(case.get("given", case["symbols"]), dtype=np.int64).reshape(shape)
    assert encode(case, given, backend) == data


@pytest.mark.parametrize("case", LONG, ids=lambda c: f"{c['codec']}-{c['name']}")
def test_golden_lanes(case: dict[str, Any]) -> None:
    symbols = np.random.default_rng(0).integers(-3, 4, 40000).reshape(case["shape"])
    data = encode(case, symbols, "auto")
    assert hashlib.sha256(data).hexdigest() == case["sha256"]
    np.testing.assert_array_equal(codecs.get(case["codec"]).decode(data, case["shape"]), symbols)


def test_golden_raw() -> None:
    (case,) = (case for case in CASES if case["codec"] == "raw")
    array = codecs.raw.decode(bytes.fromhex(case["hex"]), (3,), case["dtype"])
    assert array.dtype == np.float16
    assert array.tolist() == case["symbols"]
