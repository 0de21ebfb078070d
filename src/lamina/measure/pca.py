"""PCA of a layer's outputs: the rank j map that loses least of what the layer gives, unweighted.

The outputs `y = W x + b` vary about their mean by the covariance `C = W (H/N - m m^T) W^T`, where
`H/N` and m are the input's second moment and mean per position. With U its leading eigenvectors,

    y ~ U U^T (y - mean(y)) + mean(y):  encode = U^T W,  decode = U,  bias = b + (I - U U^T) W m

which keeps the mean output at any rank and is exact at full rank. (The published code adds b in
full and the mean of outputs that hold b already, and so counts `(I - U U^T) b` twice.)

Zhang, Zou, He, Sun 2015, arXiv:1505.06798, eq. 5.
"""

from __future__ import annotations

import torch

from lamina.measure.low_rank import balance
from lamina.measure.stats import LayerStats


def output_covariance(matrix: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    """Return the covariance of a layer's outputs per position, `[f, f]`, float64.

    Args:
        matrix: `[f, n]`, of a layer with one group.
        stats: of the layer; without a mean the second moment about zero is taken.

    Example:
        >>> one = torch.eye(2, dtype=torch.float64)
        >>> stats = LayerStats(H=4 * one[None], G=one[None], positions=4.0)
        >>> output_covariance(torch.diag(torch.tensor([1.0, 3.0])), stats).diagonal().tolist()
        [1.0, 9.0]
    """
    matrix = matrix.to(torch.float64)
    H = stats.H[0].to(matrix) / max(stats.positions, 1e-300)
    seen = (matrix * H if H.dim() == 1 else matrix @ H) @ matrix.mT
    about = matrix @ mean_input(matrix, stats)
    return seen - torch.outer(about, about)


def mean_input(matrix: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    """Return the mean input per position, `[n]`; zero where it was not measured."""
    if stats.mean is None or stats.positions <= 0:
        return matrix.new_zeros(matrix.shape[1], dtype=torch.float64)
    return stats.mean[0].to(matrix.device, torch.float64) / stats.positions


def output_energies(matrix: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    """Return the variances along the principal outputs, falling, `[min(f, n)]`."""
    values = torch.linalg.eigvalsh(output_covariance(matrix, stats)).flip(-1)
    return values.clamp_min(0)[: min(matrix.shape)]


def principal_pair(
    matrix: torch.Tensor, stats: LayerStats, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors whose product is `U U^T W`.

    Args:
        matrix: `[f, n]`.
        stats: of the layer.
        rank: j, at most `min(f, n)`.

    Returns:
        encode `[1, j, n]` and decode `[f, j]`, balanced, float64.
    """
    matrix = matrix.to(torch.float64)
    kept = torch.linalg.eigh(output_covariance(matrix, stats)).eigenvectors.flip(-1)[:, :rank]
    return balance((kept.mT @ matrix)[None], kept)


def principal_bias(
    bias: torch.Tensor | None,
    matrix: torch.Tensor,
    product: torch.Tensor,
    stats: LayerStats,
) -> torch.Tensor:
    """Return the bias that keeps the mean output: `b + (W - A B) mean(x)`, float64.

    Args:
        bias: `[f]`, or None.
        matrix: `[f, n]`; product: what stands for it, same shape.
        stats: of the layer.
    """
    matrix = matrix.to(torch.float64)
    lost = (matrix - product.to(matrix)) @ mean_input(matrix, stats)
    return lost if bias is None else bias.to(lost) + lost
