"""The version, on the lowest floor so that every room may read it."""

__version__ = "0.1.0"
