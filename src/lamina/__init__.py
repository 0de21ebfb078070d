"""Lamina: a trained PyTorch network and a budget in, the best network that fits it out.

    import lamina

    net = lamina.zoo("lenet-5")
    result = lamina.compress(net, data=net.data, budget="2%")
    result.save("net.lamina")
    model = lamina.load("net.lamina")

`compress` is the stages in a row; each is a function of its own, takes a value and returns one:
`discover` -> `measure` -> `propose` -> `plan` -> `apply` -> `recover` -> `save` -> `report`.
"""

from lamina import errors as errors
from lamina._version import __version__ as __version__

# Some functions bear the name of the package they live in (`lamina.plan`). A package is bound to
# its parent when it is first loaded: all are loaded by now, so the functions take the names over.
from lamina.compress import compress, load, save
from lamina.measure.calibrate import calibrate as measure
from lamina.methods.base import Method
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.plan import Budget, Plan, apply, plan, propose
from lamina.report import Report
from lamina.report import load_report as report
from lamina.train import Recovery, recover
from lamina.zoo import zoo

__all__ = [
    "Budget",
    "Method",
    "Network",
    "Plan",
    "Recovery",
    "Report",
    "apply",
    "compress",
    "discover",
    "load",
    "measure",
    "plan",
    "propose",
    "recover",
    "report",
    "save",
    "zoo",
]
