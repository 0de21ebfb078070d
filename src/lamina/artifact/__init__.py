"""The `.lamina` file: reading and writing it needs no method, no planner and no statistics."""

from lamina.artifact.container import pack
from lamina.artifact.dense import decompress, write_safetensors, write_state
from lamina.artifact.reading import Package, read, read_tensor, unpack
from lamina.artifact.restoring import restore

__all__ = [
    "Package",
    "decompress",
    "pack",
    "read",
    "read_tensor",
    "restore",
    "unpack",
    "write_safetensors",
    "write_state",
]
