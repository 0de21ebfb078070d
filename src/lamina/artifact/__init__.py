"""The `.lamina` file: reading and writing it needs no method, no planner and no statistics."""

from lamina.artifact.container import pack, tensors_of
from lamina.artifact.dense import decompress, summary, write_safetensors, write_shards, write_state
from lamina.artifact.reading import Package, read, read_tensor, unpack
from lamina.artifact.restoring import check_shapes, install_edits, restore

__all__ = [
    "Package",
    "check_shapes",
    "decompress",
    "install_edits",
    "pack",
    "read",
    "read_tensor",
    "restore",
    "summary",
    "tensors_of",
    "unpack",
    "write_safetensors",
    "write_shards",
    "write_state",
]
