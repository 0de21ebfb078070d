"""One weight with two uses: a table of embeddings that is the head of its network as well.

As the head, the weight `W [tokens, width]` meets hidden states: a change costs
`1/2 sum_t g_t dW_t H dW_t^T`, with the second moment `H` of the states and the power `g_t` of the
gradient at the logit of token t. As the table, row t is looked up `c_t` times a sample, and a
change costs `1/2 sum_t c_t dW_t E dW_t^T`, with the second moment `E` of the gradients at the rows
that were looked up. The sum of the two is no Kronecker product, but nearly one: where `h` and `e`
are the mean diagonals of `H` and `E`, it is

    G = h G_head + e diag(c),     H = (tr(G_head) H_head + sum(c) E) / tr(G).

Changes without direction (the noise of rounding) cost the same in every row as they do in truth.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lamina.measure.stats import LayerStats, diagonal_of


def combine_uses(head: LayerStats, table: LayerStats) -> LayerStats:
    """Return the statistics of a head that is a table as well.

    Args:
        head: seen as a linear layer: `H [1, width, width]`, `G [1, tokens, tokens]` or its diagonal
            `[1, tokens]`.
        table: seen as an embedding: `H [1, tokens]` counts, `G [1, width, width]`.

    Example:
        >>> one = torch.eye(2, dtype=torch.float64)[None]
        >>> counts = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
        >>> combine_uses(LayerStats(one, one), LayerStats(counts, one)).G[0].tolist()
        [[4.0, 0.0], [0.0, 1.0]]
    """
    H, E = head.H, table.G
    wide = head.G.dim() == 2
    powers = diagonal_of(head.G)
    h, e = (float(diagonal_of(m).mean()) for m in (H, E))
    added = e * table.H
    G = h * head.G + (added if wide else torch.diag_embed(added))
    whole = float((h * powers + added).sum())
    if whole <= 0:
        return head
    if H.dim() == 2 or E.dim() == 2:  # very wide states: diagonals only
        H, E = diagonal_of(H), diagonal_of(E)
    return replace(head, H=(float(powers.sum()) * H + float(table.H.sum()) * E) / whole, G=G)
