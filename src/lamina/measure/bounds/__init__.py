"""Bounds on the pre-activations of a ReLU network over a box of inputs: sound, in float64.

Cheapest first: `interval`, `relaxed` (linear relaxation with back-substitution), `exact` (linear
programs, integer programs). `ladder` climbs them, and `witness` looks for points that spare it the
climb. A network is a tuple of `Step`s here; where it comes from is not known.
"""

from lamina.measure.bounds.ladder import Limits, Verdict, decide
from lamina.measure.bounds.steps import Bounds, Step, run, shapes_of

__all__ = ["Bounds", "Limits", "Step", "Verdict", "decide", "run", "shapes_of"]
