"""Recovery: training that keeps a plan's decisions alive."""

from lamina.train.loop import Recovered, recover
from lamina.train.moments import recalibrate, recalibrate_if_closer
from lamina.train.recovery import Recovery

__all__ = ["Recovered", "Recovery", "recalibrate", "recalibrate_if_closer", "recover"]
