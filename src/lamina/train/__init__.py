"""Recovery: training that keeps a plan's decisions alive."""

from lamina.train.loop import Recovered, recover
from lamina.train.moments import recalibrate
from lamina.train.recovery import Recovery

__all__ = ["Recovered", "Recovery", "recalibrate", "recover"]
