"""The fuzz target, and a small coverage-guided search around it.

`fuzz_one(data)` takes any bytes as a file and checks the contract: they are refused with a
`FileError`, or they are a file, and then every tensor is what the table declares. Everything else,
an assertion here included, is a finding. The search keeps inputs that reach new lines in pairs.

`under_atheris.py` runs the same target under atheris.
"""

from __future__ import annotations

import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
from torch import nn

import lamina
from lamina.artifact import Package, restore, unpack
from lamina.codecs import kernels
from lamina.errors import FileError

MOST = 1 << 21  # bytes that a file may unfold to
LONGEST_LINE = 5000  # characters of an error
FOLDERS = tuple(
    str(Path(lamina.__file__).parent / part) for part in ("artifact", "codecs", "forms")
)
Edge = tuple[CodeType, int, int]


def fuzz_one(data: bytes) -> str:
    """Check the contract on one input; return `"refused"` or `"accepted"`.

    Raises:
        AssertionError: a file was accepted that must not be, or unfolds to something else.
        Exception: anything but a FileError came out of the reader.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            package = unpack(data, max_bytes=MOST)
            state = package.state()
        except FileError as error:
            line = str(error)
            assert len(line) < LONGEST_LINE and "\n" not in line, "an error of one line"
            return "refused"
        check(data, package, state)
        try:
            restored = restore(package, skeleton_for(state)).state_dict()
        except FileError:
            return "accepted"
        assert all(same(restored[name], state[name]) for name in state)
    return "accepted"


def check(data: bytes, package: Package, state: Mapping[str, torch.Tensor]) -> None:
    """Assert what holds for every file that was accepted."""
    assert int.from_bytes(data[-4:], "little") == zlib.crc32(data[:-4]), "the checksum"
    assert sum(package.ledger.values()) == len(data), "the ledger"
    assert sum(t.numel() * t.element_size() for t in state.values()) <= MOST, "the limit"
    assert all(isinstance(name, str) for name in state)
    for name, tensor in state.items():
        assert same(package.tensors[name].dense(), tensor), "both ways to decode agree"
        if tensor.dtype == torch.bool and tensor.numel():
            assert int(tensor.view(torch.uint8).max()) <= 1, name
    for edit in package.edits:
        assert all(type(v) is int for v in edit.settings.values())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree to the bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [t.detach().contiguous().reshape(-1) for t in (a, b)]
    return not a.numel() or torch.equal(flat[0].view(torch.uint8), flat[1].view(torch.uint8))


def skeleton_for(state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a network that has tensors of these names, as far as a network can."""
    root = nn.Module()
    for name, tensor in state.items():
        if name.startswith("fc."):  # what an edit of this layer makes
            root.fc = nn.Linear(4, 3)
            continue
        module, (*path, leaf) = root, name.split(".")
        for part in path:
            if not hasattr(module, part) and part:
                module.add_module(part, nn.Module())
            module = module._modules.get(part) or module
        if leaf and leaf not in module._buffers and not hasattr(module, leaf):
            module.register_buffer(leaf, torch.zeros_like(tensor))
    return root


@contextmanager
def without_numba() -> Iterator[None]:
    """Let every kernel run uncompiled: lists see what a compiled loop would read past their end."""
    with mock.patch.object(kernels, "_compile", lambda kernel: None):
        yield


@dataclass
class Coverage:
    """Pairs of lines in a row, within the readers' folders.

    Args:
        seen: all pairs so far.
    """

    seen: set[Edge] = field(default_factory=set)
    new: int = 0

    def run(self, work: Callable[[bytes], str], data: bytes) -> str:
        """Run something traced; `new` is then how many pairs were never seen before."""
        before = len(self.seen)
        old = sys.gettrace()
        sys.settrace(self._enter)
        try:
            return work(data)
        finally:
            sys.settrace(old)
            self.new += len(self.seen) - before

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(FOLDERS):
            return None
        last, seen = 0, self.seen

        def step(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal last
            line = frame.f_lineno
            if event == "line":
                seen.add((code, last, line))
                last = line
            elif event == "exception":
                seen.add((code, last, -line))
            return step

        return step


@dataclass(frozen=True)
class Finding:
    """An input that broke the contract."""

    case: int
    error: str
    data: bytes


def search(
    seeds: Mapping[str, bytes],
    cases: int,
    seed: int = 0,
    uncompiled: float = 0.02,
    seconds: float = 5.0,
    most: int = 4000,
) -> tuple[list[Finding], Coverage, dict[str, int]]:
    """Run `fuzz_one` on that many mutated files.

    Args:
        seeds: valid files to begin with.
        cases: how many.
        seed: of all choices; the same seed gives the same files while the code is the same.
        uncompiled: share of the cases that run a second time without numba, and must agree.
        seconds: processor time a case may take.
        most: inputs to keep beside the seeds.

    Returns:
        findings (one of each kind), the coverage, and how many were accepted and refused.
    """
    from tests.attacks.mutate import mutate

    random, coverage = Random(seed), Coverage()
    pool = [data for _, data in sorted(seeds.items())]
    findings: dict[str, Finding] = {}
    counts = {"accepted": 0, "refused": 0, "kept": 0}
    for data in pool:
        coverage.run(fuzz_one, data)
    for case in range(cases):
        valid = random.random() < 0.5  # what is damaged already seldom gets far
        begin = random.randrange(len(seeds) if valid else len(pool))
        data = mutate(pool[begin], pool[random.randrange(len(pool))], random)
        twice, coverage.new = random.random() < uncompiled, 0
        try:
            with deadline(seconds):
                verdict = coverage.run(fuzz_one, data)
            if twice and len(data) < 3000:
                with without_numba(), deadline(60 * seconds):
                    again = coverage.run(fuzz_one, data)
                assert again == verdict, "with and without numba differ"
            counts[verdict] += 1
        except Exception as error:
            findings.setdefault(describe(error), Finding(case, describe(error), data))
        if coverage.new and len(pool) < len(seeds) + most and len(data) < 20_000:
            pool.append(data)
            counts["kept"] += 1
    return list(findings.values()), coverage, counts


@contextmanager
def deadline(seconds: float, real: bool = False) -> Iterator[None]:
    """Raise TimeoutError after so much processor time (or real time), where the system can."""
    import signal

    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds} s of {'' if real else 'processor '}time")

    name, timer = (
        (signal.SIGALRM, signal.ITIMER_REAL) if real else (signal.SIGPROF, signal.ITIMER_PROF)
    )
    old = signal.signal(name, stop)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(name, old)


def describe(error: BaseException) -> str:
    """Return an error's type, text and place, without numbers: what makes two findings one."""
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name.startswith((*FOLDERS, str(Path(__file__).parent))):
            place = f"{Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    text = "".join("#" if c.isdigit() else c for c in str(error))[:120]
    return f"{type(error).__name__} in {place}: {text}"
