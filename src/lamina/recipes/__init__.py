"""Recipes: papers as wholes, from the first pruning to the last bit, with training in between.

A method is one step that the planner may choose; a recipe is a fixed sequence of steps that trains
as it goes. It ends in the same plan, file and report.
"""

from __future__ import annotations

from typing import Any

from lamina.errors import MethodError
from lamina.recipes.collapse import LayerCollapse
from lamina.recipes.deep_compression import DeepCompression
from lamina.recipes.filters import Filters
from lamina.recipes.followed import Followed
from lamina.recipes.funnel import Funnel
from lamina.recipes.fusion import LayerFusion
from lamina.recipes.low_rank import LowRank
from lamina.recipes.merge import LayerMerge
from lamina.recipes.retraining import check_data
from lamina.recipes.settings import Pruning
from lamina.recipes.transformer import IntTwoFour
from lamina.recipes.weightless import Weightless

__all__ = [
    "RECIPES",
    "DeepCompression",
    "Filters",
    "Followed",
    "Funnel",
    "IntTwoFour",
    "LayerCollapse",
    "LayerFusion",
    "LayerMerge",
    "LowRank",
    "Pruning",
    "Weightless",
    "check_data",
    "recipe_named",
]

Recipe = (
    DeepCompression
    | Weightless
    | LowRank
    | Filters
    | Funnel
    | LayerCollapse
    | LayerFusion
    | LayerMerge
    | IntTwoFour
)
RECIPES: dict[str, type[Recipe]] = {
    r.name: r
    for r in (
        DeepCompression,
        Weightless,
        LowRank,
        Filters,
        Funnel,
        LayerCollapse,
        LayerFusion,
        LayerMerge,
        IntTwoFour,
    )
}


def recipe_named(recipe: Any, **others: Any) -> Recipe | None:
    """Return a recipe by name, or the settings that were given; None for None.

    Args:
        recipe: a name, settings, or None.
        others: what a user may not say beside a recipe, by name; at its default: not said.

    Raises:
        MethodError: there is no such recipe, or it does not go with what else was said.

    Example:
        >>> recipe_named("deep-compression").bits["conv"]
        8
    """
    if recipe is None:
        return None
    if not isinstance(recipe, Recipe):
        if not isinstance(recipe, str) or recipe not in RECIPES:
            raise MethodError(
                "unknown recipe", repr(recipe), "", f"choose from {', '.join(RECIPES)}"
            )
        recipe = RECIPES[recipe]()
    for name, said in others.items():
        if said is not None and said != "auto":
            raise MethodError(
                f"{name} does not go with a recipe", f"recipe {recipe.name}",
                "a recipe is a fixed sequence of steps", f"leave {name} out",
            )  # fmt: skip
    return recipe  # type: ignore[no-any-return]
