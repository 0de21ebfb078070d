"""A fake machine: what takes how long is known, so that loops about time can be tested exactly."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lamina.forms import GroupedLinear
from lamina.measure.clock import Job, _made
from lamina.measure.cost import measured_macs

KERNELS = (nn.Linear, nn.Conv2d, GroupedLinear)


class Machine:
    """Times jobs by their multiply-accumulates and the kernels that start.

    Args:
        rate: of one multiply-accumulate [s].
        start: of one kernel [s].
        whole: by this a whole network is slower than the sum of its layers.
        noise: every second round is slower by this factor, all jobs alike.
    """

    def __init__(
        self, rate: float = 1e-9, start: float = 1e-6, whole: float = 1.2, noise: float = 3.0
    ) -> None:
        self.rate, self.start, self.whole, self.noise = rate, start, whole, noise
        self.timed = 0  # jobs
        self.networks: type[nn.Module] | tuple[()] = ()

    def seconds(self, job: Job) -> float:
        total = 0.0
        for call in job.calls:
            args, kwargs = _made(call.args), _made(call.kwargs)
            kernels = sum(isinstance(m, KERNELS) for m in job.module.modules())
            macs = measured_macs(job.module, args, kwargs) * len(args[0])
            total += call.count * (self.rate * macs + self.start * kernels)
        return total * (self.whole if isinstance(job.module, self.networks) else 1.0)

    def __call__(self, jobs: Sequence[Job], threads: int, seconds: float) -> list[list[float]]:
        self.timed += len(jobs)
        once = [self.seconds(job) for job in jobs]
        return [[t * (self.noise if i % 2 else 1.0) for t in once] for i in range(5)]


class Net(nn.Module):
    """Three wide layers, two of one geometry, and a head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.wide, self.head = nn.Linear(width, 4 * width), nn.Linear(4 * width, 8)

    def forward(self, x):  # type: ignore[no-untyped-def]
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.wide(x).relu())


def machine_for(network: type[nn.Module] = Net, **settings: float) -> Machine:
    """A machine that knows which module is a whole network."""
    machine = Machine(**settings)
    machine.networks = network
    return machine
