"""The manifest: read strictly, so that no two readers take a file for two things."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lamina.artifact import pack
from lamina.artifact.manifest import (
    MAX_NAME,
    flaw_of,
    read_edits,
    read_header,
    read_json,
    read_manifest,
    read_table,
)
from lamina.errors import FileError


def test_a_table_is_read_with_its_short_names():
    table = read_table({"tensors": "a.b.weight:2,3 .bias:2:bf16 c: d:0,5:bool"})
    assert table == [
        ("a.b.weight", (2, 3), torch.float32),
        ("a.b.bias", (2,), torch.bfloat16),
        ("c", (), torch.float32),
        ("d", (0, 5), torch.bool),
    ]


@pytest.mark.parametrize(
    "entry", ["a", "a:+1", "a:1_0", "a:1,", "a:1:f32:f32", "a:1 a:1", "a..b:1"]
)
def test_a_wrong_entry_names_itself(entry):
    with pytest.raises(FileError, match="manifest is not valid at '"):
        read_table({"tensors": entry})


@pytest.mark.parametrize("text", ['{"a":1,"a":1}', "NaN", "[Infinity]", "{", ""])
def test_what_two_readers_could_read_as_two_things_is_no_json(text):
    with pytest.raises(ValueError):
        read_json(text)


def test_a_header_is_compared_exactly():
    def header(size, **more):
        blob = {"dtype": "U8", "shape": [size], "data_offsets": [0, size], **more}
        return json.dumps({"__metadata__": {"lamina": "{}", "format": "pt"}, "d": blob}).encode()

    assert read_header(header(9), 9) == "{}"
    for bad in (header(8), header(9, shape=[9.0]), header(9, data_offsets=[False, 9])):
        with pytest.raises(FileError, match="not as long as told"):
            read_header(bad, 9)


def test_a_manifest_is_completed_and_its_plan_is_a_map():
    found = read_manifest('{"lamina":2,"tensors":"","plan":"keep"}')
    assert (found["plan"], found["skeleton"], found["by"]) == ({"*": "keep"}, "module", "")
    assert read_manifest('{"lamina":1,"tensors":""}')["plan"] == {}
    for text in (
        '{"lamina":2}',
        '{"lamina":2,"tensors":"","by":1}',
        '{"lamina":2,"tensors":"","box":[0,1]}',
        '{"lamina":2,"tensors":"","plan":[]}',
    ):
        with pytest.raises(FileError, match="manifest is not valid"):
            read_manifest(text)


def test_edits_are_path_form_and_integers():
    (edit,) = read_edits({"edits": [["fc.0", "low_rank", {"rank": 3}]]})
    assert (edit.path, edit.form, edit.settings, edit.values) == (
        "fc.0",
        "low_rank",
        {"rank": 3},
        None,
    )
    for bad in ([["fc.", "low_rank", {}]], [["fc", "low_rank", {"rank": True}]], [["fc", "x"]], {}):
        with pytest.raises(FileError, match="edits"):
            read_edits({"edits": bad})


@pytest.mark.parametrize(
    "name", ["", ".", "a.", ".a", "a b", "a:b", "a\0", "a\x7f", "\ud800", "é\u2028"]
)
def test_a_name_no_reader_takes_is_not_written(name):
    assert flaw_of(name)
    assert flaw_of("a" * (MAX_NAME + 1)) and not flaw_of("a" * MAX_NAME) and not flaw_of("größe.0")
    net = nn.Module()
    if name and "." not in name:
        net.register_buffer(name, torch.zeros(1))
        with pytest.raises(FileError, match="name cannot be stored"):
            pack(net, (), "module", {})


@pytest.mark.parametrize(
    "more",
    [
        {"by": "\x1b[2J"},
        {"box": "0,1\x1b[2J"},
        {"skeleton": "zoo:\x07"},
        {"plan": "rdoq\x00"},
        {"plan": {"\x1b": "rdoq"}},
        {"edits": [["fc", "low_rank\x1b", {"rank": 2}]]},
        {"edits": [["fc", "low_rank", {"rank\n": 2}]]},
    ],
)
def test_texts_that_steer_a_terminal_are_refused(more):
    with pytest.raises(FileError):
        read_edits(read_manifest(json.dumps({"lamina": 2, "tensors": "", **more})))
