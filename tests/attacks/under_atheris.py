"""The fuzz target under atheris (not a dependency: `pip install atheris`, Python 3.11 to 3.13).

Run: python -m tests.attacks.under_atheris FOLDER -runs=100000. Kernels run uncompiled, so that it
sees their branches; the folder is filled with the small valid files first, and collects more.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from random import Random


def main() -> None:
    os.environ.update(LAMINA_NUMBA="0", LAMINA_THREADS="1", OMP_NUM_THREADS="1")
    import atheris
    import torch  # noqa: F401  before, so that it is not instrumented

    with atheris.instrument_imports(include=["lamina.artifact", "lamina.codecs", "lamina.forms"]):
        from tests.attacks.files import valid_files
        from tests.attacks.fuzz import fuzz_one
        from tests.attacks.mutate import mutate

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in valid_files().items():
        if len(data) < 3000:
            (folder / name).write_bytes(data)

    def change(data: bytes, most: int, seed: int) -> bytes:
        return mutate(data, data, Random(seed))[:most]

    def target(data: bytes) -> None:
        fuzz_one(data)

    atheris.Setup(sys.argv, target, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
