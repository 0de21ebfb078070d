"""Recovery: training that keeps a plan's decisions alive."""

from lamina.train.loop import Recovered, Recovery, recalibrate, recover

__all__ = ["Recovered", "Recovery", "recalibrate", "recover"]
