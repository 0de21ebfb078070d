"""The `.lamina` file: reading and writing it needs no method, no planner and no statistics."""

from lamina.artifact.container import Package, pack, read, restore, unpack

__all__ = ["Package", "pack", "read", "restore", "unpack"]
