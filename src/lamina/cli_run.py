"""What the verbs of the command line share: opening a model and its data, and a run folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina import cli_show as show
from lamina.errors import BudgetError, RunError

if TYPE_CHECKING:
    from lamina.network.source import Network
    from lamina.run import RunFolder


@contextmanager
def run_folder(folder: Path) -> Iterator[RunFolder | None]:
    """Open a run folder; errors that leave it say which one it was.

    Of several processes (`torchrun`, `accelerate launch`) the first one alone holds the folder; the
    others get None.
    """
    from lamina.run import open_run

    if folder.suffix == ".lamina" and not folder.is_dir():
        raise RunError(
            "a run folder is asked for, not a file", str(folder),
            "the network is written into it, as net.lamina", "give -o runs/mine",
        )  # fmt: skip
    if int(os.environ.get("RANK", "0")):
        yield None
        return
    try:
        with open_run(folder) as run:
            yield run
    except (Exception, KeyboardInterrupt) as error:
        error.run_folder = folder  # type: ignore[union-attr]
        raise


def carry_out(
    run: RunFolder | None, model: str, data: str | None, skeleton: str | None, budget: Any,
    shape: tuple[int, int] = (0, 0), **settings: Any,
) -> None:  # fmt: skip
    """Run `compress` into a run folder, and print its report; without one, only help to train.

    Args:
        run: the folder.
        model, data, skeleton: as the user named them.
        budget, settings: of `compress`.
        shape: samples and tokens that a latency is of; 0: what `timed_at` takes.

    Raises:
        BudgetError: a shape, where the network is never run.
    """
    from lamina.compress import compress as go

    if run is None:
        return help_out(model, skeleton)
    from lamina.streaming import why_stream

    streams = skeleton is None and why_stream(model, settings.get("stream"))
    if streams and any(shape):
        raise BudgetError(
            "--batch and --tokens do not go with streaming", model,
            "the network is never run as a whole", "leave them out",
        )  # fmt: skip
    network: Any
    network, loaders = (model, data) if streams else open_both(model, data, skeleton)
    if any(shape):
        network = timed_at(network, loaders, *shape)
        if network.task:  # or the data's first sample would take its place again
            settings["example_inputs"] = network.example_kwargs or network.example_inputs
    with show.progress_bar() as watch:
        result = go(network, loaders, budget, run=run, watch=watch, **settings)
    show.say(result.report.table())
    show.say(f"\nnetwork  {run.path / 'net.lamina'}\nplan     {run.path / 'plan.json'}"
             f"\nreport   {run.path / 'report.html'}")  # fmt: skip


def help_out(model: str, skeleton: str | None) -> None:
    """Help the first process with its trainings; what goes wrong is for that one to say."""
    from lamina.errors import LaminaError
    from lamina.opening import open_model
    from lamina.train.crew import Crew, assist

    with suppress(LaminaError):
        open_model(model, None, None, skeleton)  # a class of the user's must be known by its name
    crew = Crew()
    with suppress(LaminaError):
        assist(crew)


def open_both(
    model: str, data: str | None, skeleton: str | None, own_data: bool = False
) -> tuple[Any, Any]:
    """Return the network and its data: what was named, or with `own_data` what it brings along."""
    from lamina.data import as_data, load
    from lamina.opening import open_model, with_example

    network = open_model(model, None, None, skeleton)
    loaders = load(data, network=network) if data is not None else None
    network = network if loaders is None else with_example(network, loaders)
    return network, as_data(network.data) if own_data and loaders is None else loaders


def timed_at(network: Network, loaders: Any, batch: int = 0, tokens: int = 0) -> Network:
    """Return a network whose example is what a latency is of.

    Args:
        network: with a sample of the data as its example, where there are any.
        loaders: its data, or None.
        batch, tokens: 0: one sample of the data; without data one of 128 tokens.
    """
    from lamina.opening import with_shape, with_timed_example

    return with_shape(with_timed_example(network) if loaders is None else network, batch, tokens)


def write_dense(file: Path, out: Path, to: str = "") -> None:
    """Write the dense tensors of a file, and say which."""
    from lamina import artifact
    from lamina.network.small_folders import small_file

    held = small_file(file) or file
    show.say(artifact.summary(artifact.decompress(held, out, to), out))
