"""The options that several verbs share, and how their text is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.errors import BudgetError, MethodError

if TYPE_CHECKING:
    from lamina.plan import Budget

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Zoo name, folder, file.py:function or .lamina file."),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A .lamina file.")]
Document = Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json, as `plan` wrote it.")]
DataName = Annotated[
    str | None,
    typer.Option(
        "--data", help="mnist-10k, x.npz, text:FILE, jsonl:FILE, images:FOLDER, file.py:function."
    ),
]
Size = Annotated[str | None, typer.Option(help="File size: 2%, 1/400, 12x (smaller), 4MB.")]
Macs = Annotated[str | None, typer.Option(help="Multiply-accumulates: 50%, 2x (fewer), 300M.")]
Params = Annotated[str | None, typer.Option(help="Parameters: 50%, 2x (fewer), 1.5M.")]
Latency = Annotated[str | None, typer.Option(help="Time of a forward pass: 50%, 0.5x, 3ms.")]
MaxDrop = Annotated[
    str | None, typer.Option(help="Points of the metric that may be lost, on validation data.")
]
Recover = Annotated[
    str,
    typer.Option(
        help="Train afterwards: auto, none, a number of epochs, or settings: epochs=2,parts=scales."
    ),
]
Methods = Annotated[
    str | None, typer.Option(help="Choose among these only, e.g. alds,rdoq; default: all.")
]
Asked = Annotated[
    str | None,
    typer.Option(
        "--methods",
        help="Ask these only, e.g. alds,rdoq, or all; default: all, of a large "
        "network the quick ones.",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(help="Follow a paper as a whole, e.g. deep-compression; a wrong name lists all."),
]
RecipeSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="A setting of the recipe; may be given several times."
    ),
]
Lossless = Annotated[
    bool, typer.Option("--lossless", help="Change nothing: every tensor bit for bit, smaller.")
]
LosslessStructure = Annotated[
    bool,
    typer.Option(
        "--lossless-structure", help="Remove first what provably changes nothing (see --box)."
    ),
]
Box = Annotated[
    str | None,
    typer.Option(metavar="LOW,HIGH", help="Of the inputs it holds for; default: the data's range."),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric", help="accuracy, loss, perplexity, agreement, ... or file.py:function."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration samples to look at.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read a Hugging Face folder layer by layer; default: where memory is short.",
    ),
]
Skeleton = Annotated[
    str | None,
    typer.Option(help="For a .lamina file of your own network: file.py:function that builds it."),
]
Against = Annotated[
    str | None,
    typer.Option(help="The original to compare with: a MODEL; default: the file's own."),
]
Compressed = Annotated[
    str | None,
    typer.Argument(metavar="COMPRESSED", help="What was made of MODEL; without: MODEL is it."),
]
BatchSize = Annotated[int, typer.Option("--batch", help="Samples of one forward pass.")]
Tokens = Annotated[
    int, typer.Option(help="Tokens of a sample; 0: as in the data, without any 128.")
]
TimedBatch = Annotated[
    int,
    typer.Option(
        "--batch",
        min=0,
        help="Samples that a latency is of; 0: as in the example, of a folder one.",
    ),
]
TimedTokens = Annotated[
    int,
    typer.Option("--tokens", min=0, help="Tokens of each; 0: as in the data, without any 128."),
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch.")]
Seconds = Annotated[float, typer.Option(help="What timing may take, about.")]
Layers = Annotated[bool, typer.Option("--layers", help="Also time each layer.")]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")]
Explain = Annotated[
    str | None,
    typer.Option(metavar="LAYER", help="Say why: what was to choose for LAYER; all: in a line."),
]
Reuse = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Use what a run measured; without a budget also its plan."),
]
RunPath = Annotated[Path | None, typer.Option("-o", "--out", help="Run folder.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The file to write.")]
ExportTo = Annotated[str, typer.Option(help="safetensors, pt, hf, lamina-hf or onnx.")]
Like = Annotated[
    Path | None, typer.Option(help="Folders: the original one; its tokenizer comes along.")
]
Integers = Annotated[
    bool | None,
    typer.Option("--int8/--float", help="onnx: all linear layers, or none, in integers."),
]
Tolerance = Annotated[
    float | None, typer.Option(help="onnx: how far outputs may be off, |onnx - torch| / |torch|.")
]


def read_budget(
    size: str | None = None, macs: str | None = None, params: str | None = None,
    latency: str | None = None, max_drop: str | None = None,
) -> Budget:  # fmt: skip
    """Return the budget of the five options; an empty one is refused by Budget itself."""
    from lamina.plan import Budget

    return Budget(size=size, macs=macs, params=params, latency=latency, max_drop=max_drop)


def read_limits(*limits: str | None, needed: bool = True) -> Budget | None:
    """Return the budget, or None where none was given and none is needed."""
    return read_budget(*limits) if needed or any(x is not None for x in limits) else None


def read_epochs(text: str) -> Any:
    """Read --recover: a number of epochs is a number, anything else is judged by `compress`."""
    try:
        return float(text)
    except ValueError:
        return text


def read_structure(wanted: bool, box: str | None) -> Any:
    """Return what `compress` takes as `lossless_structure`.

    Raises:
        BudgetError: a box, and nothing that it is for.
    """
    if box is not None and not wanted:
        raise BudgetError("--box needs --lossless-structure", box, "", "give both")
    return None if not wanted else True if box is None else box


def read_names(text: str | None) -> list[str] | None:
    """Read --methods; all is what nothing is, too."""
    if text is None or text.strip() == "all":
        return None
    return [name.strip() for name in text.split(",") if name.strip()]


def read_metric(text: str | None) -> Any:
    """Read --metric: a name stays a name, file.py:function is the user's own."""
    if text is None or ".py" not in text:
        return text
    from lamina.network.load import load_function

    return load_function(text)


def read_recipe(name: str | None, settings: Sequence[str] | None) -> Any:
    """Return the recipe: its name, or with settings its dataclass with these changed.

    Args:
        name: of the recipe, or None.
        settings: `name=value` each; a dot leads into a setting that holds others, and a value is
            JSON or else text.

    Raises:
        MethodError: settings without a recipe, or that it does not have.

    Example:
        >>> made = read_recipe("deep-compression", ["pruning.density=0.05", "bits.fc1=4"])
        >>> made.pruning.density, made.bits["fc1"], made.start
        (0.05, 4, 'linear')
    """
    if not settings:
        return name
    from lamina.recipes import RECIPES, recipe_named

    if name is None:
        raise MethodError("--set needs a recipe", settings[0], "", "give --recipe NAME")
    recipe: Any = RECIPES[name]() if name in RECIPES else recipe_named(name)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise MethodError("cannot read a setting", repr(setting), "", "write NAME=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        try:
            recipe = changed(recipe, path.strip(), value)
        except (TypeError, ValueError, AttributeError) as error:
            raise MethodError("a setting cannot be used", setting, str(error)) from None
    return recipe


def changed(settings: Any, path: str, value: Any) -> Any:
    """Return settings with one changed; a mapping takes the whole rest of the path as its key."""
    if isinstance(settings, Mapping):
        return {**settings, path: value}
    name, _, rest = path.partition(".")
    names = [f.name for f in fields(settings)] if is_dataclass(settings) else []
    if name not in names:
        why = f"there are {', '.join(names)}" if names else "it is a single value"
        raise MethodError("no such setting of the recipe", repr(path), why)
    old = getattr(settings, name)
    if rest:
        value = changed(old, rest, value)
    elif is_dataclass(old) or isinstance(old, Mapping) != isinstance(value, Mapping):
        raise MethodError("a setting cannot be used", path, "it holds others", f"{path}.NAME=VALUE")
    if isinstance(old, tuple) and isinstance(value, list):  # JSON has no tuples
        value = tuple(value)
    return replace(settings, **{name: value})
