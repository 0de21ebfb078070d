"""Where masked weights on grids begin: column after column, the rest making up for each.

A mask by magnitude and a grid of 4 bits take a tenth of what a layer gives before training begins.
Here the inputs of a layer are gone through from first to last: two of every four weights of an
output go, those that stay are rounded, and the weights that are still to come take up both errors,
by the second moment of what the layer is given: after the rounding of its inputs, if there is one.
What is trained on is each weight as it was before its own rounding.

Least squares that make up for the rounding of inputs as well, and biases for its mean, did harm:
a few tokens of enormous inputs decide them.

Reference: Frantar and Alistarh 2023 (SparseGPT), arXiv:2301.00774, sections 3.3 and 3.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lamina.measure.forward import at_rest, batches, call
from lamina.methods.sawb import CONSTANTS, round_to
from lamina.methods.two_four import DAMPING, GROUP, keep_mask
from lamina.network.sites import as_matrix, from_matrix
from lamina.train.distill import counted
from lamina.train.quantized import QuantizedNetwork, QuantizedWeight, roundable

ROOM = 1 << 28  # bytes of moments that are held at a time; what is more takes another pass
FLOOR = 1e-30  # of a mean square: a layer may be given nothing but zeros


def refit(net: QuantizedNetwork, loader: Iterable[Any], count: int, prune: bool) -> None:
    """Put weights where the layers give the most of what they gave, in place.

    Masks of layers that calibration does not reach, or whose module does not show what its weight
    is given (torch's attention), are chosen by magnitude.

    Args:
        net: on its grids and with its inputs rounded already, where they are to be.
        loader: batches.
        count: how many are looked at.
        prune: choose the masks too.

    Raises:
        DataError: there is no batch.
    """
    layers: list[Any] = list(net.weights)
    for weights in _chunks(layers):
        moments = observe_moments(net, weights, loader, count)
        for weight, moment in zip(weights, moments, strict=True):
            if moment is not None:
                _settle(weight, moment, prune and weight.prunes)
            elif prune:
                weight.prune()


def observe_moments(
    net: QuantizedNetwork, weights: Sequence[QuantizedWeight], loader: Iterable[Any], count: int
) -> list[Tensor | None]:
    """Return the second moments `[in, in]` of what layers are given, without padding.

    There is none of a layer that shows nothing.

    Args: as for `refit`, and the layers' weights.
    """
    given: dict[str, list[Tensor]] = {}

    def note(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            given.setdefault(path, []).append(args[0])

        return hook

    paths = [w.site.module for w in weights]
    shown = set(roundable(net.body, (w.site for w in weights)))
    sizes = [as_matrix(w.site, w.latent).shape[2] for w in weights]
    sums = [torch.zeros(n, n, device=w.latent.device) for n, w in zip(sizes, weights, strict=True)]
    rows = [0] * len(paths)
    # Hooks run in the order they came in: these see what the rounding ones return.
    hooks = [net.body.get_submodule(p).register_forward_pre_hook(note(p)) for p in sorted(shown)]
    try:
        with at_rest(net), torch.no_grad():
            for batch in islice(batches(net.body, loader), count):
                given.clear()
                call(net, batch)
                for i, path in enumerate(paths):
                    for x in given.get(path, ()):
                        flat = counted(x, batch.mask).float().reshape(-1, x.shape[-1])
                        sums[i] += flat.T @ flat
                        rows[i] += len(flat)
    finally:
        for hook in hooks:
            hook.remove()
    return [total / n if n else None for total, n in zip(sums, rows, strict=True)]


def settle_in_order(
    weight: Tensor, H: Tensor, step: Tensor | None, levels: int, prune: bool
) -> tuple[Tensor, Tensor]:
    """Return weights as they were before each was rounded, and which of them stay.

    Args:
        weight: `[out, in]`, float64.
        H: `[in, in]` second moment of the inputs.
        step: of the grid at each weight, `[out, in]`; None: there is no grid.
        levels: of the grid on either side of 0.
        prune: let two of every four go.

    See `prune_in_order` of `two_four`, which does this without a grid.
    """
    W, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    before = torch.empty_like(W)
    damping = DAMPING * H.diagonal().mean().clamp_min(FLOOR)
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H + damping * eye))
    U = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    for start in range(0, W.shape[1], GROUP):
        stop = min(start + GROUP, W.shape[1])
        if prune:
            score = W[:, start:stop] / U.diagonal()[start:stop]
            mask[:, start:stop] = keep_mask(score.square())
        errors = torch.zeros(len(W), stop - start).to(W)
        for i, j in enumerate(range(start, stop)):
            before[:, j] = W[:, j]
            held = W[:, j] if step is None else round_to(W[:, j], step[:, j], levels)
            kept = torch.where(mask[:, j], held, 0.0)
            errors[:, i] = (W[:, j] - kept) / U[j, j]
            W[:, j + 1 : stop] -= errors[:, i : i + 1] * U[j, j + 1 : stop]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return before, mask


@torch.no_grad()
def _settle(weight: QuantizedWeight, H: Tensor, prune: bool) -> None:
    site = weight.site
    matrix = as_matrix(site, weight.latent)[0].double()
    step, levels = None, 0
    if weight.bits:
        every = weight.step().double().expand_as(weight.latent)
        step, levels = as_matrix(site, every)[0], CONSTANTS[weight.bits][0]
    before, mask = settle_in_order(matrix, H.double(), step, levels, prune)
    # Pruned weights stay in the latent: the grid's range is that of a dense tensor.
    weight.latent.copy_(from_matrix(site, before[None]))
    if prune:
        weight.mask.copy_(from_matrix(site, mask[None]))


def _chunks(weights: Iterable[QuantizedWeight]) -> Iterator[list[QuantizedWeight]]:
    """Yield layers, as many at a time as there is room for the moments of."""
    chunk: list[QuantizedWeight] = []
    held = 0
    for weight in weights:
        size = 4 * as_matrix(weight.site, weight.latent).shape[2] ** 2
        if chunk and held + size > ROOM:
            yield chunk
            chunk, held = [], 0
        chunk.append(weight)
        held += size
    if chunk:
        yield chunk
