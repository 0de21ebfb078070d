"""Folders of tiny models."""

from tests.hf_folders import own, tiny

__all__ = ["own", "tiny"]
