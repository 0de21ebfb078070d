"""Small real data that ships with the package, and loaders for the user's own."""

from lamina.data.batches import as_data, inputs_of, labels_of, size_of
from lamina.data.loaders import Data, TensorLoader, mirror, shift
from lamina.data.sources import load

__all__ = [
    "Data",
    "TensorLoader",
    "as_data",
    "inputs_of",
    "labels_of",
    "load",
    "mirror",
    "shift",
    "size_of",
]
