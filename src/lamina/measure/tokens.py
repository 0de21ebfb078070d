"""What the tokens of a table weigh: how often each is to be expected, and how much it then matters.

The second moment of one-hot inputs is diagonal: the counts of the tokens. Seen in a thousand
samples they say too much of what was seen, and nothing of what was not. And not all tokens are
felt alike: the gradient at a rare word is larger than at a full stop.
"""

from __future__ import annotations

import torch
from torch import Tensor

RARE = 2  # counts up to which a token is as good as unseen
PRIOR = 4.0  # counts that the power of rare tokens is worth against a token's own


def expected_counts(counts: Tensor) -> Tensor:
    """Return how often each token is to be expected in other data of the same size and kind.

    What was seen once came by chance more often than not, and what was not seen will come: every
    token that was seen gives up the same share of one count, and all tokens share what they gave.

    Args:
        counts: of each token in the data `[..., tokens]`.

    Example:
        >>> counts = torch.tensor([5.0, 2.0, 1.0, 1.0, 0.0, 0.0])
        >>> [round(x, 3) for x in expected_counts(counts).tolist()]
        [4.833, 1.833, 0.833, 0.833, 0.333, 0.333]

    Reference: Ney, Essen, Kneser 1994, On structuring probabilistic dependences in stochastic
    language modelling (absolute discounting, its share from the tokens seen once and twice).
    """
    once, twice = (int((counts == k).sum()) for k in (1, 2))
    if not once or not twice:
        return counts
    share = once / (once + 2 * twice)
    given = share * int((counts > 0).sum()) / counts.numel()
    return (counts - share).clamp_min(0) + given


def relative_power(counts: Tensor, powers: Tensor) -> Tensor:
    """Return how strong the gradient at each token is, over the mean of all that was looked up.

    A token that was seen often speaks for itself, one that was not, as rare tokens do together.

    Args:
        counts: of each token `[tokens]`.
        powers: squared gradients at each token, summed over its uses `[tokens]`.

    Example:
        >>> relative_power(torch.tensor([2.0, 2.0, 0.0]), torch.tensor([2.0, 2.0, 0.0])).tolist()
        [1.0, 1.0, 1.0]
    """
    whole, uses = float(powers.sum()), float(counts.sum())
    if whole <= 0 or uses <= 0:
        return torch.ones_like(counts)
    rare = (counts > 0) & (counts <= RARE)
    known = rare if bool(rare.any()) else counts > 0
    usual = powers[known].sum() / counts[known].sum()
    each = (powers + PRIOR * usual) / (counts + PRIOR)
    return each * uses / (each * counts).sum()
