"""Hostile files by name: each must be refused, soon, and without much memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from tests.attacks.files import coded_bodies, mend, seal, wrap

from lamina.artifact.records import CODEC_IDS, varint

Build = Callable[[], bytes]
STEP = struct.pack("<f", 1.0)
PLAIN = b"\0" + bytes(24)  # a plain tensor of 2 x 3
TABLE = "weight:2,3 bias:2"
BODIES = PLAIN, b"\0" + bytes(8)
HUGE = (1 << 16, 1 << 31, 1 << 40, 1 << 62)


def changed(**entries: Any) -> Build:
    """A small file that is right but for some keys of its manifest."""
    return lambda: seal({"tensors": TABLE, **entries}, *BODIES)


def tables(table: str, *bodies: bytes) -> Build:
    return lambda: seal({"tensors": table}, *(bodies or (b"\0",)))


def record(body: bytes, shape: str = "2,3") -> Build:
    return lambda: seal({"tensors": f"weight:{shape}"}, body)


def manifest_text(text: str) -> Build:
    return lambda: wrap(text, b"")


def header(**changes: Any) -> Build:
    """A file whose safetensors header says something else."""

    def build() -> bytes:
        text = json.dumps({"lamina": 1, "tensors": ""})
        blob = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
        whole = {"__metadata__": {"lamina": text}, "d": {**blob, **changes.pop("d", {})}, **changes}
        return wrap("", b"", {k: v for k, v in whole.items() if v is not None})

    return build


def header_length(length: int) -> Build:
    return lambda: mend(struct.pack("<Q", length) + seal({"tensors": ""})[8:-4])


def coded(codec: str, data: bytes, shape: str, form: int = 3) -> Build:
    """A grid (or a codebook of one) of a codec's bytes, written by hand."""
    head = bytes([form | CODEC_IDS.index(codec) << 3])
    return record(head + (STEP if form == 3 else varint(0) + STEP) + data, shape)


SHELL: dict[str, Build] = {
    "nothing": lambda: b"",
    "one byte": lambda: b"\x08",
    "seven bytes": lambda: bytes(7),
    "a length alone": lambda: bytes(8),
    "zeros": lambda: bytes(4096),
    "a header of no bytes": header_length(0),
    "a header to the last byte": lambda: mend(struct.pack("<Q", 4) + b"{}  "),
    **{
        f"a header of {n} bytes": header_length(n)
        for n in (1 << 20, 100_000_001, 1 << 40, 1 << 63, (1 << 64) - 1)
    },
    "a header that is no text": lambda: wrap("", b"", b"\xff\xfe\xfd" * 40),
    "a header of brackets": lambda: wrap("", b"", b"[" * 100_000),
    "a header of maps": lambda: wrap("", b"", b'{"a":' * 100_000),
    "no manifest": header(__metadata__={}),
    "no metadata": header(__metadata__=None),
    "metadata of numbers": header(__metadata__={"lamina": 1}),
    "metadata in a list": header(__metadata__=[["lamina", "{}"]]),
    "no data": header(d={"dtype": None}),
    "data of floats": header(d={"dtype": "F32"}),
    "data that begin later": header(d={"data_offsets": [4, 4]}),
    "data that end before": header(d={"data_offsets": [0, 3]}),
    "data that end after": header(d={"data_offsets": [0, 5]}),
    "data that end far off": header(d={"data_offsets": [0, 1 << 62]}),
    "data before the file": header(d={"data_offsets": [-4, 0]}),
    "data from truth": header(d={"data_offsets": [False, 4]}),
    "data to a float": header(d={"data_offsets": [0, 4.0]}),
    "data of three ends": header(d={"data_offsets": [0, 4, 4]}),
    "data of no ends": header(d={"data_offsets": []}),
    "data to a word": header(d={"data_offsets": "04"}),
    "data of another shape": header(d={"shape": [5]}),
    "data of a huge shape": header(d={"shape": [1 << 40]}),
    "data of two sides": header(d={"shape": [2, 2]}),
    "a second tensor over the first": header(
        e={"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    ),
    "the header's keys twice": lambda: wrap(
        "",
        b"",
        b'{"__metadata__":{"lamina":"{\\"lamina\\":1,\\"tensors\\":\\"\\"}"},'
        b'"d":{"dtype":"U8","shape":[9],"data_offsets":[0,9]},'
        b'"d":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    ),
    "a wrong checksum": lambda: seal({"tensors": TABLE}, *BODIES)[:-1] + b"\xaa",
    "a checksum of zeros": lambda: seal({"tensors": TABLE}, *BODIES)[:-4] + bytes(4),
    "a byte after the end": lambda: seal({"tensors": TABLE}, *BODIES) + b"\0",
    "two files": lambda: seal({"tensors": TABLE}, *BODIES) * 2,
}

TEXT: dict[str, Build] = {
    **{
        f"manifest {text}": manifest_text(text)
        for text in ("", "null", "[]", "3", '"x"', "{}", "{", "nan")
    },
    "deep lists": manifest_text(
        '{"lamina":1,"tensors":"","plan":' + "[" * 100_000 + "]" * 100_000 + "}"
    ),
    "deep maps": manifest_text(
        '{"lamina":1,"tensors":"","plan":' + '{"a":' * 50_000 + "1" + "}" * 50_001
    ),
    "deep edits": manifest_text('{"lamina":1,"tensors":"","edits":' + "[" * 900 + "]" * 900 + "}"),
    "tensors twice": manifest_text('{"lamina":1,"tensors":"a:2","tensors":""}'),
    "version twice": manifest_text('{"lamina":99,"tensors":"","lamina":1}'),
    "settings twice": manifest_text(
        '{"lamina":1,"tensors":"","edits":[["fc","low_rank",{"rank":1,"rank":2,"folds":1}]]}'
    ),
    "a number of 5000 digits": manifest_text('{"lamina":' + "1" * 5000 + ',"tensors":""}'),
    "a number of a million digits": manifest_text(
        '{"lamina":' + "1" * 1_000_000 + ',"tensors":""}'
    ),
}

MANIFEST: dict[str, Build] = {
    **{
        f"version {v!r}": changed(lamina=v)
        for v in (0, 4, 99, -1, 2.0, 3.0, True, "1", None, [1], float("nan"), float("inf"), 1 << 70)
    },
    **{f"tensors {v!r}": changed(tensors=v) for v in (None, 3, [], {}, ["weight:2,3"], True, 1.5)},
    **{
        f"skeleton {v!r}": changed(skeleton=v)
        for v in (None, 3, ["zoo:lenet-5"], {"zoo": "lenet-5"})
    },
    **{f"by {v!r}": changed(by=v) for v in (3, ["x"], {})},
    **{
        f"plan {v!r}": changed(plan=v)
        for v in (3, [], None, {"fc": ["keep"]}, {"fc": 1}, {"fc": None})
    },
    **{
        f"edits {v!r}": changed(edits=v)
        for v in (
            3,
            "fc",
            {},
            {"abc": 1},
            None,
            [1],
            ["abc"],
            [["fc", "low_rank"]],
            [["fc", "low_rank", {}, 1]],
            [["fc", "low_rank", []]],
            [["fc", "low_rank", "x"]],
            [[None, "low_rank", {"rank": 1}]],
            [[3, "low_rank", {"rank": 1}]],
            [["fc", None, {"rank": 1}]],
            [["fc", ["low_rank"], {"rank": 1}]],
        )
    },
    **{
        f"rank {v!r}": changed(edits=[["fc", "low_rank", {"folds": 1, "rank": v}]])
        for v in (
            2.7,
            1.0,
            True,
            None,
            "2",
            " 2_0 ",
            [1],
            {},
            float("nan"),
            float("inf"),
            -float("inf"),
        )
    },
}

NAMES: dict[str, Build] = {
    f"name {name!r}": tables(f"{name}:0")
    for name in (
        "",
        ".",
        "..",
        "...",
        "a..b",
        "a.",
        ".a.",
        "../a",
        "../../etc/passwd",
        "a\0b",
        "a\x1b[2J",
        "\ud800",
    )
} | {
    "one name twice": tables("a:0 a:0", b"\0", b"\0"),
    "one name twice, short": tables("m.a:0 m.b:0 .a:0", b"\0", b"\0", b"\0"),
    "a name of a megabyte": tables("a" * (1 << 20) + ":0"),
    "names that grow": lambda: seal({"tensors": "a.a:0 " + ".x.y:0 " * 40_000}, *[b"\0"] * 40_001),
}

SHAPES: dict[str, Build] = {
    **{
        f"shape {sides}": tables(f"weight:{sides}", PLAIN)
        for sides in (
            "-2,-3",
            "2,-3",
            "+2,3",
            "2, 3",
            "2,,3",
            "2,3,",
            ",",
            "2.0,3",
            "2e0,3",
            "0x2,3",
            "1_0",
            "two,3",
            "nan",
            "inf",
            "\u0662,\u0663",
            "2;3",
            "2,3:f32:f32",
            "2,3:F32",
            "2,3:f8",
            "2,3:u1",
            "2,3:object",
            "2,4",
            "3,3",
            "",
            "2,3,0",
            "6:f64",
            "6:c64",
        )
    },
    **{f"shape of {n}": tables(f"weight:{n}", PLAIN) for n in HUGE},
    "a product past 64 bits": tables(f"weight:{1 << 33},{1 << 33}", PLAIN),
    "a product that wraps to 6": tables(f"weight:{1 << 32},{1 << 32},6", PLAIN),
    "empty and huge": tables(f"weight:0,{1 << 62},{1 << 62}"),
    "40 sides": tables("weight:" + ",".join("1" * 40), b"\0" + bytes(4)),
    "a million sides": tables("weight:" + ",".join(["1"] * 1_000_000), b"\0" + bytes(4)),
    "sides of 4000 digits": tables("weight:" + ",".join(["9" * 4000] * 400)),
    "a side of a million digits": tables("weight:" + "9" * 1_000_000),
    "a tensor more": tables("weight:2,3 more:1", PLAIN),
    "a tensor fewer": tables("weight:2,3", *BODIES),
}

RECORDS: dict[str, Build] = {
    "an empty record": record(b""),
    **{f"form {form}": record(bytes([form]) + PLAIN[1:]) for form in (4, 5, 6, 7)},
    **{
        f"codec 7 of form {form}": record(bytes([form | 7 << 3]) + STEP + bytes(24))
        for form in (1, 2, 3)
    },
    **{f"plain of codec {codec}": record(bytes([codec << 3]) + PLAIN[1:]) for codec in range(2, 8)},
    "plain, a byte short": record(PLAIN[:-1]),
    "plain, a byte long": record(PLAIN + b"\0"),
    "a length without end": lambda: wrap(json.dumps({"lamina": 1, "tensors": "a:1"}), b"\xff" * 40),
    **{
        f"a length of {n}": lambda n=n: wrap(
            json.dumps({"lamina": 1, "tensors": "a:1"}), varint(n) + bytes(9)
        )
        for n in HUGE
    },
    **{f"a mask of {n} bytes": record(bytes([1]) + varint(n) + bytes(24)) for n in HUGE},
    **{f"{n} centroids": record(bytes([2]) + varint(n) + bytes(24)) for n in HUGE},
    **{
        f"{n} bytes of exponents": record(bytes([0x43]) + STEP + b"\0" + varint(n) + bytes(48))
        for n in HUGE
    },
    "a mask of twos": record(bytes([1]) + varint(24) + struct.pack("<6i", *[2] * 6) + bytes(24)),
    "a mask of minus ones": record(
        bytes([1]) + varint(24) + struct.pack("<6i", *[-1] * 6) + bytes(24)
    ),
    "fewer non-zeros than told": record(
        bytes([1]) + varint(24) + struct.pack("<6i", *[1] * 6) + bytes(20)
    ),
    "more non-zeros than told": record(
        bytes([1]) + varint(24) + struct.pack("<6i", *[1] * 6) + bytes(28)
    ),
    "an index past the table": record(bytes([2]) + varint(0) + STEP + struct.pack("<6i", *[1] * 6)),
    "an index below the table": record(
        bytes([2]) + varint(0) + STEP + struct.pack("<6i", *[-1] * 6)
    ),
    "a step cut off": record(bytes([3, 0, 0])),
    "exponents of 999": record(
        bytes([0x43]) + STEP + b"\0" + varint(8) + struct.pack("<2i", 999, -999) + bytes(24)
    ),
    "exponents of a scalar": record(bytes([0x43]) + STEP + b"\0" + varint(4) + bytes(8), ""),
    "exponents of unknown codec": record(bytes([0x43]) + STEP + b"\7" + varint(8) + bytes(32)),
    "a third truth value": record(b"\0\1\2\0\0\0\0", "2,3:bool"),
    **{
        f"a grid of {kind}": record(bytes([3]) + STEP + bytes(24), f"2,3:{kind}")
        for kind in ("bool", "i8", "i64")
    },
    **{
        f"a codebook of {kind}": record(bytes([2]) + varint(0) + STEP + bytes(24), f"2,3:{kind}")
        for kind in ("bool", "u8")
    },
}

# a few bytes that claim much: a constant under rans (all elements 0), zeros of no bytes elsewhere
BOMBS: dict[str, Build] = {
    "a constant of 2^34": coded("rans", b"\x50", "131072,131072"),
    "a constant of 2^40": coded("rans", b"\x50", "1048576,1048576"),
    "zeros of 2^32": coded("rans", b"", "65536,65536"),
    "a large adaptive": coded("adaptive", b"\x80", "2048,1025"),
    "an empty adaptive": coded("adaptive", b"", "65536,65536"),
    "many, each within the limit": lambda: seal(
        {"tensors": " ".join(f"t{i}:256,256" for i in range(2000))},
        *[bytes([3 | 1 << 3]) + STEP + b"\x50"] * 2000,
    ),
    "a sparse one of nothing": lambda: seal(
        {"tensors": "a:65536,65536"}, bytes([1 | 2 << 3]) + varint(0)
    ),
    **{
        f"a huge {codec} of {len(data)} bytes": coded(codec, data, "60000,60000", form)
        for codec, form in (("rans", 3), ("adaptive", 3), *((c, 3) for c in CODEC_IDS[3:]))
        for data in (b"", b"\0", b"\0" * 9, b"\xff" * 9, b"\x55" * 40)
    },
}


def lying_codes() -> dict[str, Build]:
    """Every codec's bytes under a larger shape than they were made for."""
    found: dict[str, Build] = {}
    for name, (entry, body) in coded_bodies().items():
        rows = entry.split(",")[0]
        if not name.startswith(CODEC_IDS) or rows == "1":
            continue
        shape = f"{rows}000,{entry.split(',')[1]}00"
        found[f"{name} under {shape}"] = record(body, shape)
    return found


ALL = SHELL | TEXT | MANIFEST | NAMES | SHAPES | RECORDS | BOMBS
