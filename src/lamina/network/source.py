"""A Network: the user's module, example inputs, and where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Network:
    """A trained network with what is needed to run it and to rebuild it.

    Args:
        module: the network itself; never changed in place.
        example_inputs: positional inputs of one forward pass; dimension 0 is the batch.
        source: how to rebuild the skeleton: `"zoo:lenet-5"`, `"python:net.py:build"`,
            `"transformers:{...}"` (class and configuration) or `"module"`.
        name: a short name for reports.
        data: the network's own loaders, if it has any (`train`, `calibration`, `validation`,
            `test`).
        loss: what its outputs are: `"logits"`, `"features"` or `"auto"` (decided when measured).
        edits: structural edits that turn what `source` rebuilds into this module (a network that
            was opened from a file has some).
        task: of a `transformers` model, what it is for (`"causal"`, ...); `""` of any other.
        folder: where its tokenizer lies; never written to a file.
        disk_bytes: what the files it was opened from take: the 100 % of a budget's size; 0: what
            its tensors take.
        known: its digest, where the module has no values to make one of (it is streamed).
        packed_bytes: size of the `.lamina` file it was opened from; 0: it was not.
        box: for which inputs it equals what it was made of, `"low,high"` (of each channel,
            separated by semicolons); `""`: nothing was made of anything, or there is no limit.

    Example:
        >>> net = Network(nn.Linear(3, 2), (torch.zeros(1, 3),))
        >>> net.forward(torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """

    module: nn.Module
    example_inputs: tuple[Any, ...] = ()
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str = "module"
    name: str = "network"
    data: Any = None
    loss: str = "auto"
    edits: tuple[Any, ...] = ()
    box: str = ""
    task: str = ""
    folder: str = ""
    disk_bytes: int = 0
    packed_bytes: int = 0
    known: str = ""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the module without gradients, in evaluation mode; return its main output tensor."""
        training = {m: m.training for m in self.module.modules()}
        self.module.eval()
        try:
            with torch.no_grad():
                return main_output(self.module(*args, **kwargs))
        finally:
            for m, flag in training.items():
                m.training = flag

    def digest(self) -> str:
        """Return a hash of every parameter and buffer: name, shape, dtype and bytes [hex]."""
        return self.known or digest(self.module)


def digest(module: nn.Module) -> str:
    """Return a hash of a module's parameters and buffers: names, shapes, dtypes, bytes [16 hex]."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        sha.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return sha.hexdigest()[:16]


def main_output(output: Any) -> torch.Tensor:
    """Return the tensor that stands for a network's output.

    A tensor is itself; a Hugging Face style output gives `.logits`, else its first floating tensor;
    a tuple, list or mapping gives its first floating tensor.

    Raises:
        NetworkError: the network returned no tensor.
    """
    from lamina.errors import NetworkError

    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    items = output.values() if isinstance(output, Mapping) else output
    if isinstance(items, (tuple, list)) or hasattr(items, "__iter__"):
        for item in items:
            if isinstance(item, torch.Tensor) and item.is_floating_point():
                return item
    raise NetworkError(
        "the network returned no tensor",
        type(output).__name__,
        "Lamina compares outputs, so it needs one floating tensor",
        "wrap the network so that forward returns a tensor",
    )
