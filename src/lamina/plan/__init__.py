"""The decision: budget, candidates, allocation, the plan document, and carrying it out."""

from lamina.plan.apply import Edited, apply
from lamina.plan.budget import Budget
from lamina.plan.chains import Candidates
from lamina.plan.decide import plan
from lamina.plan.offers import propose
from lamina.plan.plan import Decision, Plan

__all__ = ["Budget", "Candidates", "Decision", "Edited", "Plan", "apply", "plan", "propose"]
