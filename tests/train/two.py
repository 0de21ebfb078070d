"""What each of two processes does in `test_crew`: started by `torch.distributed.run`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests.train.small import edit_grids, make_batches, make_data, make_mlp, make_network
from torch import nn

from lamina.data import Data
from lamina.errors import LaminaError
from lamina.network.source import Network
from lamina.plan.apply import Edited
from lamina.train import Recovered, Recovery, recover
from lamina.train.crew import led, process_number

SETTINGS = Recovery(epochs=4, lr=5e-3, accumulate=2, clip=1.0, seed=3)
LIMIT = 900.0


def plain_network() -> tuple[Network, Edited]:
    """Without BatchNorm and dropout: nothing in it depends on who computes which sample."""
    torch.manual_seed(3)
    network = make_network(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3)))
    return network, edit_grids(network, 0.1)


def normed_network() -> tuple[Network, Edited]:
    network = make_network(make_mlp())
    return network, edit_grids(network, 0.1)


def state_of(made: Recovered) -> dict[str, torch.Tensor]:
    return dict(made.edited.model.state_dict())


def stop_at_four(done: int, total: int, text: str) -> None:
    if done == 20:
        raise KeyError("stopped")


def failed(rank: int) -> str:
    """Train on labels that only the second half of a batch has wrong."""
    network, edited = plain_network()
    x, y = make_batches()[0]
    y = y.clone()
    y[-1] = 7
    try:
        recover(replace(network, loss="logits"), edited, Data(train=[(x, y)]), Recovery(epochs=1))
    except LaminaError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@led
def whole_work(rank: int) -> dict[str, Any]:
    """Two trainings that the first process alone asks for."""
    network, edited = plain_network()
    first = recover(network, edited, make_data(), SETTINGS, limit=LIMIT)
    second = recover(network, first.edited, make_data(), SETTINGS, limit=LIMIT)
    return {"rank": rank, "state": state_of(second)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    import torch.distributed as dist

    rank, count = process_number()
    found: dict[str, Any] = {"count": count}
    network, edited = plain_network()
    # Only the first process's data counts: the second one's would not even fit.
    data = Data(train=[torch.zeros(2, 3)]) if rank else make_data()
    made = recover(network, edited, data, SETTINGS, limit=LIMIT)
    found |= {"state": state_of(made), "history": made.history}
    single = Data(train=[(x[:1], y[:1]) for x, y in make_batches()])
    found["single"] = state_of(recover(network, edited, single, Recovery(epochs=1)))
    network, edited = normed_network()
    settings = Recovery(epochs=5, lr=5e-3, rate=False)
    start = recover(network, edited, make_data(), settings)
    found["normed"] = state_of(start)
    checkpoint = folder / "checkpoint.pt"
    try:
        recover(network, edited, make_data(), settings, checkpoint=checkpoint,
                progress=stop_at_four)  # fmt: skip
    except (KeyError, LaminaError) as error:
        found["stopped"] = type(error).__name__
    dist.barrier()
    found["kept"] = checkpoint.exists()
    again = recover(network, edited, make_data(), settings, checkpoint=checkpoint)
    found["again"] = state_of(again)
    found["failed"] = failed(rank)
    found["led"] = whole_work(rank)
    torch.save(found, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
