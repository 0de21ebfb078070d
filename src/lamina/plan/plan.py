"""The plan: the decision, as a JSON document a person can read, edit, diff and re-apply."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.errors import PlanError
from lamina.measure.stats import Cost
from lamina.methods.base import Step, find_method
from lamina.network.sites import Sites

VERSION = 1
REWRITE = r"^(fold|channels_last|stable [-+.,;e0-9]+)$"


@dataclass(frozen=True)
class Decision:
    """What one site will undergo, what that is predicted to cost, and the predicted error."""

    steps: tuple[Step, ...]
    cost: Cost
    error: float

    def describe(self) -> str:
        """Return the chain as text: `alds(folds=2, rank=17) -> rdoq(step=.03) | rdoq(step=.05)`."""
        places: dict[str, list[str]] = {}
        for step in self.steps:
            places.setdefault(step.at, []).append(str(step))
        return " | ".join(" -> ".join(chain) for chain in places.values())


@dataclass(frozen=True)
class Plan:
    """A decision for every site of one network.

    Args:
        network: digest of the network the plan was made for.
        sites: the decision of each layer site, or of a span (a chain, a family) for its members.
        budget: the budget as JSON, see `Budget`.
        objective: `"sum"` of errors, or `"minimax"`.
        original: what the network costs as it is.
        predicted: what it will cost in all, everything outside the sites included.
        fixed_bits: what the tensors of no site and the file's own structure take [bits].
        error: the predicted error [nats per sample], or the largest relative error (minimax).
        curve: the network's rate-distortion curve: (size [bytes], error) pairs.
        name: the network's name.
        rewrite: how the network is rewritten before anything else, without loss: of `"fold"`,
            `"stable LOW,HIGH"` (for inputs in this box) and `"channels_last"`.
    """

    network: str
    sites: Mapping[str, Decision]
    budget: Mapping[str, Any] = field(default_factory=dict)
    objective: str = "sum"
    original: Cost = field(default_factory=Cost)
    predicted: Cost = field(default_factory=Cost)
    fixed_bits: float = 0.0
    error: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()
    name: str = "network"
    rewrite: tuple[str, ...] = ()

    def show(self, sites: Sites | None = None) -> str:
        """Return the plan as a plain text table.

        Args:
            sites: of the network; with them the layers of a span have lines that say so.
        """
        rows = [("site", "chain", "bytes", "error")]
        for name, d in self.sites.items():
            rows.append((name, d.describe(), f"{d.cost.bits / 8:,.0f}", f"{d.error:.3g}"))
            members = sites[name].members if sites is not None and name in sites else ()
            rows += [(f"  {member}", f"in {name}", "", "") for member in members]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]:>{widths[3]}}"
            for r in rows
        ]
        lines = [line.rstrip() for line in lines]
        ratio = self.original.bits / max(self.predicted.bits, 1)
        if self.rewrite:
            lines.append(f"rewritten first: {', '.join(self.rewrite)}")
        lines.append(
            f"{self.name}: {self.original.bits / 8:,.0f} -> {self.predicted.bits / 8:,.0f} bytes "
            f"({ratio:.1f}x smaller), predicted error {self.error:.3g} ({self.objective})"
        )
        return "\n".join(lines)

    def dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        rewriting = {"rewrite": list(self.rewrite)} if self.rewrite else {}
        return {
            "lamina_plan": VERSION,
            "name": self.name,
            "network": self.network,
            **rewriting,
            "budget": dict(self.budget),
            "objective": self.objective,
            "original": vars(self.original),
            "predicted": vars(self.predicted) | {"error": self.error},
            "fixed_bits": self.fixed_bits,
            "sites": {
                name: {
                    "steps": [
                        {"method": s.method, "at": s.at, "settings": dict(s.settings)}
                        for s in d.steps
                    ],
                    "cost": vars(d.cost),
                    "error": d.error,
                }
                for name, d in self.sites.items()
            },
            "curve": [list(point) for point in self.curve],
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        from lamina.run import write_atomic

        write_atomic(Path(path), (json.dumps(self.dict(), indent=1) + "\n").encode())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: the file is missing, is not a plan, or names unknown methods.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise PlanError("cannot read the plan", str(path), why) from None
        try:
            document = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PlanError("the plan is not JSON", str(path), str(error)) from None
        return Plan.from_dict(document, str(path))

    @staticmethod
    def from_dict(document: Any, where: str = "plan") -> Plan:
        """Check a JSON document and return its plan.

        Raises:
            PlanError: what is wrong, and where in the document.
        """
        from pydantic import ValidationError

        from lamina.errors import MethodError

        try:
            read = _document().model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in first["loc"]) or "the document"
            raise PlanError("the plan is not valid", f"{where}: {place}", first["msg"]) from None
        sites = {}
        for name, site in read.sites.items():
            steps = tuple(Step(s.method, s.at, dict(s.settings)) for s in site.steps)
            for step in steps:
                try:
                    find_method(step.method)
                except MethodError as error:
                    raise PlanError(
                        "the plan names an unknown method", f"{where}: {name}", "", error.fix
                    ) from None
            sites[name] = Decision(steps, Cost(**site.cost.model_dump()), site.error)
        predicted = read.predicted.model_dump()
        error_sum = predicted.pop("error")
        return Plan(
            network=read.network,
            sites=sites,
            budget=dict(read.budget),
            objective=read.objective,
            original=Cost(**read.original.model_dump()),
            predicted=Cost(**predicted),
            fixed_bits=read.fixed_bits,
            error=error_sum,
            curve=tuple((a, b) for a, b in read.curve),
            name=read.name,
            rewrite=tuple(read.rewrite),
        )


def _document() -> Any:
    """Return the pydantic model of the document (on first use: pydantic is slow to import)."""
    from typing import Annotated, Literal

    from pydantic import ConfigDict, Field, create_model

    strict = ConfigDict(extra="forbid", allow_inf_nan=True)

    def model(title: str, /, **fields: Any) -> Any:
        return create_model(title, __config__=strict, **fields)

    cost: dict[str, Any] = dict.fromkeys(("params", "bits", "macs", "seconds"), (float, 0.0))
    cost_model = model("Cost", **cost)
    predicted = model("Predicted", **cost, error=(float, 0.0))
    step: Any = model("Step", method=(str, ...), at=(str, ...), settings=(dict[str, Any], {}))
    site: Any = model(
        "Site",
        steps=(list[step], ...),
        cost=(cost_model, cost_model()),
        error=(float, 0.0),
    )
    return model(
        "Plan",
        lamina_plan=(Literal[1], ...),
        name=(str, "network"),
        network=(str, ...),
        rewrite=(list[Annotated[str, Field(pattern=REWRITE)]], []),
        budget=(dict[str, Any], {}),
        objective=(Literal["sum", "minimax"], "sum"),
        original=(cost_model, cost_model()),
        predicted=(predicted, predicted()),
        fixed_bits=(float, 0.0),
        sites=(dict[str, site], ...),
        curve=(list[tuple[float, float]], []),
    )
