"""Do the certificates hold? 1,000 random layers, every number of folds, several ranks.

    python benchmarks/certificates/run.py [--layers 1000] [--seed 0] [--output FILE]

Each layer is folded, every fold is truncated by numpy's SVD in float64, and the true relative
spectral error of the difference is compared with the scores `paper` (Theorem 1 of ALDS), `rss`,
`exact`, and `repo` (that of the published code, without sqrt(k)). A score is violated where the
truth is more than 1e-6 of s_1 above it. Writes `result.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

import lamina
from lamina.measure.certificates import bound_paper, bound_rss, exact_errors, score_repo
from lamina.measure.schemes import fold
from lamina.measure.spectra import fold_spectra

KINDS = ("gaussian", "falling", "low rank and noise", "blocks", "unequal channels", "heavy tails")
ROUNDING = 1e-6  # of s_1
SHARES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)  # of the full rank
BARS = {"violations": {"paper": 0, "rss": 0, "exact": 0}, "repo_fails": True}


def layer(kind: str, f: int, c: int, taps: int, random: np.random.Generator) -> np.ndarray:
    """Return a weight `[f, c * taps]` with a spectrum of one kind."""
    n = c * taps
    matrix = random.standard_normal((f, n))
    if kind == "falling":
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        return u * np.exp(-np.arange(len(s)) / random.uniform(1, 16)) @ vh
    if kind == "low rank and noise":
        rank = int(random.integers(1, max(2, min(f, n) // 2)))
        return random.standard_normal((f, rank)) @ random.standard_normal((rank, n)) + 0.1 * matrix
    if kind == "blocks":  # groups of channels with a subspace of their own: made for folds
        parts = np.array_split(np.arange(n), 4)
        for part in parts:
            rank = int(random.integers(1, 5))
            low = random.standard_normal((f, rank)) @ random.standard_normal((rank, len(part)))
            matrix[:, part] = low + 0.02 * matrix[:, part]
    elif kind == "unequal channels":
        matrix *= np.repeat(np.exp(random.standard_normal(c)), taps)
    elif kind == "heavy tails":
        matrix = random.standard_t(3, (f, n))
    return matrix


def judge(matrix: np.ndarray, folds: int, ranks: list[int]) -> dict[str, list[float]]:
    """Return the truth and every score at several ranks."""
    tensor = torch.from_numpy(matrix)
    spectra = fold_spectra(tensor, [1, folds])
    largest, own = float(spectra[1][0, 0]), spectra[folds]
    parts = [np.linalg.svd(m, full_matrices=False) for m in np.split(matrix, folds, 1)]
    norm = np.linalg.norm(matrix, 2)
    u, s, _ = torch.linalg.svd(fold(tensor, folds), full_matrices=False)
    found: dict[str, list[float]] = {
        "true": [],
        "exact": exact_errors(u * s[:, None], 1, largest, ranks),
    }
    for rank in ranks:
        delta = [(u[:, rank:] * s[rank:]) @ vh[rank:] for u, s, vh in parts]
        found["true"].append(float(np.linalg.norm(np.concatenate(delta, 1), 2) / norm))
    for name, score in (("rss", bound_rss), ("paper", bound_paper), ("repo", score_repo)):
        found[name] = [score(own, largest, rank) for rank in ranks]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(given.seed)
    names = ("paper", "rss", "exact", "repo")
    violated_layers = dict.fromkeys(names, 0)
    violations = dict.fromkeys(names, 0)
    worst = dict.fromkeys(names, 0.0)
    slack: dict[str, list[float]] = {name: [] for name in names}
    points, start = 0, time.perf_counter()
    for index in range(given.layers):
        kind = KINDS[index % len(KINDS)]
        f, c = int(random.integers(4, 49)), int(random.choice([4, 6, 8, 12, 16, 24, 32]))
        taps = int(random.choice([1, 9]))
        matrix = layer(kind, f, c, taps, random)
        below = dict.fromkeys(names, False)
        for folds in (k for k in range(1, c + 1) if c % k == 0):
            most = min(f, c * taps // folds)
            ranks = sorted(
                {0, *(round(most * share) for share in (0.1, 0.25, 0.5, 0.75, 0.9)), most}
            )
            found = judge(matrix, folds, ranks)
            for i, true in enumerate(found["true"]):
                points += 1
                for name in names:
                    score = found[name][i]
                    if true > score + ROUNDING:
                        violations[name] += 1
                        below[name] = True
                    if true > ROUNDING:
                        worst[name] = max(worst[name], true / score)
                        slack[name].append(score / true)
        for name in names:
            violated_layers[name] += below[name]
    medians = {name: round(float(np.median(values)), 4) for name, values in slack.items()}
    result = {
        "task": "certificates",
        "command": f"python benchmarks/certificates/run.py --layers {given.layers} "
        f"--seed {given.seed}",
        "date": date.today().isoformat(),
        "seed": given.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "lamina": lamina.__version__,
        },
        "layers": given.layers,
        "kinds": list(KINDS),
        "points": points,
        "rounding": ROUNDING,
        "violations": violations,
        "violated_layers": violated_layers,
        "largest_true_over_score": {name: round(v, 6) for name, v in worst.items()},
        "median_score_over_true": medians,
        "seconds": round(time.perf_counter() - start, 1),
        "bars": BARS,
        "met": not any(violations[n] for n in BARS["violations"]) and violations["repo"] > 0,  # type: ignore[attr-defined]
    }
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
