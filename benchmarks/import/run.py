"""What `import lamina` costs on top of `import torch`: median of fresh processes, in turns.

python benchmarks/import/run.py
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import lamina

ROUNDS = 9
CODE = "import time, torch; a = time.perf_counter(); import {}; print(time.perf_counter() - a)"


def seconds(module: str) -> float:
    command = [sys.executable, "-c", CODE.format(module)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    seconds("lamina")  # fills the caches
    rounds = [(seconds("lamina"), seconds("json")) for _ in range(ROUNDS)]
    result = {
        "date": datetime.date.today().isoformat(),
        "versions": {
            "lamina": lamina.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "device": "cpu",
        "rounds": ROUNDS,
        "import_lamina_s": round(statistics.median(a for a, _ in rounds), 3),
        "import_json_s": round(statistics.median(b for _, b in rounds), 3),
        "goal_s": 0.3,
    }
    Path(__file__).with_name("result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
