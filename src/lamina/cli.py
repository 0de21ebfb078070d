"""The command line: each verb parses, calls public functions, and prints; no logic lives here.

Exit codes: 0 done; 2 the input was wrong; 3 no plan fits the budget; 130 interrupted; 1 a fault of
Lamina's own. Imports are inside the verbs, so that `--help` and usage errors are quick.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lamina import cli_show as show
from lamina.cli_options import (
    Against,
    Asked,
    BatchSize,
    Box,
    Compressed,
    DataName,
    Document,
    Explain,
    ExportTo,
    File,
    Integers,
    JsonOut,
    Latency,
    Layers,
    Like,
    Lossless,
    LosslessStructure,
    Macs,
    MaxDrop,
    Methods,
    MetricName,
    Model,
    Out,
    Params,
    Recipe,
    RecipeSettings,
    Recover,
    Reuse,
    RunPath,
    Samples,
    Seconds,
    Seed,
    Size,
    Skeleton,
    Stream,
    Threads,
    TimedBatch,
    TimedTokens,
    Tokens,
    Tolerance,
    read_epochs,
    read_limits,
    read_metric,
    read_names,
    read_recipe,
    read_structure,
)  # fmt: skip
from lamina.cli_run import carry_out, open_both, run_folder, write_dense
from lamina.errors import DataError

TOP = """Compress a trained PyTorch network to a budget.

MODEL is a zoo name (lenet-5), a Hugging Face folder (or a GGUF file), file.py:function (a function
of yours that returns the network, or (network, example_inputs)), or a .lamina file. DATA is
mnist-10k, file.npz (arrays x and y), text:FILE or jsonl:FILE (for folders with a tokenizer),
images:FOLDER, or file.py:function (returns batches, or a dict of train / validation / test).

\b
Examples:
  lamina compress lenet-5 --data mnist-10k --size 2%     the whole way, into runs/lenet-5-2pct
  lamina inspect  net.py:build                           what can be compressed, what was refused
  lamina compress net.py:build --data x.npz --size 12x --recover none -o runs/mine
  lamina evaluate runs/mine/net.lamina --data x.npz --skeleton net.py:build
  lamina methods                                         what Lamina can do to a network

\b
A run that was stopped, in any way, goes on when the same command is given again. To train on
several GPUs or processes: torchrun --nproc-per-node 2 -m lamina compress ...
Exit codes: 0 done, 2 wrong input, 3 no plan fits the budget, 130 interrupted, 1 a fault of Lamina.
"""

app = typer.Typer(
    help=TOP, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  lamina {line}" for line in lines)


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
) -> None:
    pass  # `main` reads both, wherever they stand


@app.command(
    epilog=_examples(
        "inspect lenet-5 --data mnist-10k",
        "inspect ./minilm --data text:corpus.txt --methods rdoq,alds",
        "inspect runs/lenet-5-2pct/net.lamina",
    )
)
def inspect(
    model: Model, data: DataName = None, samples: Samples = 250, skeleton: Skeleton = None,
    methods: Asked = None,
) -> None:  # fmt: skip
    """Show what can be compressed, and what was refused.

    With --data also how small each layer gets by itself at a harmless predicted error: of a large
    network by the quick methods only, unless --methods names others. Of a .lamina file: where its
    bytes are (without --data, its network is not even built).
    """
    from lamina.cli_inspect import inspect as look

    look(model, data, skeleton, samples=samples, methods=methods)


@app.command(
    epilog=_examples(
        "compress lenet-5 --data mnist-10k --size 1%",
        "compress net.py:build --data net.py:loaders --size 20x --max-drop 0.5 -o runs/mine",
        "compress lenet-300-100 --lossless-structure --box=-0.43,2.83",
        "compress lenet-5 --size 4x                    (data-free, never trains)",
        "compress lenet-5 --data mnist-10k --recipe deep-compression --set pruning.density=0.05",
    )
)
def compress(
    model: Model, data: DataName = None, size: Size = None, macs: Macs = None,
    params: Params = None, latency: Latency = None, max_drop: MaxDrop = None,
    recover: Recover = "auto", methods: Methods = None, metric: MetricName = None,
    samples: Samples = 1000, seed: Seed = 0, skeleton: Skeleton = None, recipe: Recipe = None,
    settings: RecipeSettings = None, lossless: Lossless = False,
    lossless_structure: LosslessStructure = False, box: Box = None, stream: Stream = None,
    batch: TimedBatch = 0, tokens: TimedTokens = 0, out: RunPath = None,
) -> None:  # fmt: skip
    """Go the whole way, from a network to a small file.

    Measure, plan, apply, recover, pack, report.

    The run folder gets net.lamina (the network), plan.json (the decisions, to read and to edit) and
    report.html / .md / .json. Without -o it is runs/MODEL-SIZE. The same command continues a run
    that was stopped; another budget in the same folder uses what was measured again.
    """
    structure = read_structure(lossless_structure, box)
    free = bool(recipe or lossless or structure)
    budget = read_limits(size, macs, params, latency, max_drop, needed=not free)
    kind = {"recipe": recipe} if recipe else {"lossless": ""} if lossless else {}
    kind |= {"structure": ""} if structure else {}
    folder = out or Path("runs") / show.slug(model, kind | (budget.to_json() if budget else {}))
    with run_folder(folder) as run:
        carry_out(
            run, model, data, skeleton, budget, recover=read_epochs(recover),
            methods=read_names(methods), metric=read_metric(metric), samples=samples, seed=seed,
            recipe=read_recipe(recipe, settings), lossless=lossless, lossless_structure=structure,
            stream=stream, shape=(batch, tokens),
        )  # fmt: skip


@app.command(
    epilog=_examples(
        "plan lenet-5 --data mnist-10k --size 2% -o plan.json",
        "plan lenet-5 --data mnist-10k --size 2% --explain fc1",
        "plan lenet-5 --data mnist-10k --run runs/lenet-5-2pct --explain all",
    )
)
def plan(
    model: Model, data: DataName = None, size: Size = None, macs: Macs = None,
    params: Params = None, latency: Latency = None, max_drop: MaxDrop = None,
    methods: Methods = None, metric: MetricName = None, samples: Samples = 1000, seed: Seed = 0,
    skeleton: Skeleton = None, explain: Explain = None, run: Reuse = None,
    batch: TimedBatch = 0, tokens: TimedTokens = 0, out: Out = Path("plan.json"),
) -> None:  # fmt: skip
    """Decide what each layer will undergo, as plan.json.

    With --explain say why: what every method offers for a layer, what each point costs, the point
    taken and the price at this budget. Nothing is changed and nothing is trained.
    """
    from lamina.cli_plan import decide

    budget = read_limits(size, macs, params, latency, max_drop, needed=run is None)
    decide(
        model, data, skeleton, budget, explain=explain, reuse=run, out=out,
        methods=read_names(methods), metric=read_metric(metric), samples=samples, seed=seed,
        shape=(batch, tokens),
    )  # fmt: skip


@app.command(epilog=_examples("apply lenet-5 plan.json --data mnist-10k -o net.lamina"))
def apply(
    model: Model, document: Document, data: DataName = None, samples: Samples = 1000,
    seed: Seed = 0, skeleton: Skeleton = None, out: Out = Path("net.lamina"),
) -> None:  # fmt: skip
    """Carry out a plan, untrained, as a .lamina file.

    Give the --data, --samples and --seed that the plan was made with: methods that look at data
    look at it again.
    """
    from lamina.compress import compress as go
    from lamina.plan import Plan

    decided = Plan.load(document)
    network, loaders = open_both(model, data, skeleton)
    with show.progress_bar() as watch:
        result = go(
            network, loaders, plan=decided, recover=None, samples=samples, seed=seed, watch=watch
        )
    result.save(out)
    show.say(f"{result.report.table()}\nnetwork: {out}")


@app.command(epilog=_examples("recover lenet-5 plan.json --data mnist-10k --epochs 5 -o runs/x"))
def recover(
    model: Model, document: Document, data: DataName = None,
    epochs: Annotated[str, typer.Option(help="Epochs, auto, or settings (see compress).")] = "auto",
    metric: MetricName = None, samples: Samples = 1000, seed: Seed = 0,
    skeleton: Skeleton = None, out: RunPath = None,
) -> None:  # fmt: skip
    """Carry out a plan and train what it leaves, into a run folder."""
    from lamina.plan import Plan

    decided = Plan.load(document)
    folder = out or Path("runs") / show.slug(model, {"plan": document.stem})
    with run_folder(folder) as run:
        carry_out(
            run, model, data, skeleton, None, plan=decided, recover=read_epochs(epochs),
            metric=read_metric(metric), samples=samples, seed=seed,
        )  # fmt: skip


@app.command(
    epilog=_examples(
        "evaluate net.lamina --data mnist-10k --split test",
        "evaluate net.py:build --data x.npz --metric loss",
    )
)
def evaluate(
    model: Model, data: DataName = None, metric: MetricName = "accuracy",
    split: Annotated[str, typer.Option(help="validation, test, train or calibration.")] = "test",
    against: Against = None, skeleton: Skeleton = None,
) -> None:  # fmt: skip
    """Measure a network or a .lamina file on data."""
    from lamina.measure.quality import LABEL_FREE, metric_named
    from lamina.measure.quality import evaluate as judge

    wanted = metric_named(read_metric(metric) or "accuracy")
    if split not in ("validation", "test", "train", "calibration"):
        raise DataError("unknown split", repr(split), "", "give validation, test or train")
    network, loaders = open_both(model, data, skeleton, own_data=True)
    loader = getattr(loaders, split, None)
    if loader is None:
        raise DataError(f"no {split} data", data or "--data", "", "give another --split or --data")
    original = None
    if wanted.name in LABEL_FREE:
        original, _ = open_both(against or skeleton or show.origin_of(model), data, None)
    value = judge(network, loader, wanted, original=original)
    show.say(f"{wanted.name} {value:.4f} {wanted.unit}".rstrip() + f" ({split})")


@app.command(epilog=_examples("report runs/lenet-5-2pct", "report runs/x --html x.html"))
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its report.json.")],
    html: Annotated[Path | None, typer.Option(help="Also write the page here.")] = None,
) -> None:
    """Print a run's report again."""
    from lamina.report import load_report

    found = load_report(run)
    show.say(found.table())
    if html is not None:
        found.html(html)
        show.say(f"report: {html}")


@app.command(
    epilog=_examples(
        "export net.lamina --to hf -o folder --like original   (plain from_pretrained opens it)",
        "export net.lamina --to lamina-hf -o folder            (small; after import lamina.hf)",
        "export net.lamina --to onnx -o net.onnx --int8        (checked in onnxruntime)",
        "export net.lamina --to safetensors -o net.safetensors",
    )
)
def export(
    file: File, out: Out, to: ExportTo = "safetensors", like: Like = None, int8: Integers = None,
    tolerance: Tolerance = None, skeleton: Skeleton = None,
) -> None:  # fmt: skip
    """Write a .lamina file in another format, whole or not at all.

    hf: a folder for transformers, where layers kept their shapes. lamina-hf: a folder for it that
    keeps the small file. onnx: refused where onnxruntime computes something else.
    """
    from lamina.exporting import export as go

    show.say(go(file, out, to, like=like, skeleton=skeleton, int8=int8, tolerance=tolerance))


@app.command(
    epilog=_examples(
        "decompress net.lamina -o net.safetensors",
        "decompress net.lamina -o net.pt               (a state dict of torch)",
    )
)
def decompress(file: File, out: Out) -> None:
    """Write the dense tensors of a .lamina file.

    As safetensors, or as a state dict (.pt, .pth). The names are those of the compressed network:
    of a layer that became two, the names of both. Tied tensors are written once. Needs no skeleton.
    """
    write_dense(file, out)


@app.command(
    epilog=_examples("bench net.lamina", "bench ./minilm net.lamina --tokens 128 --layers")
)
def bench(
    model: Model, compressed: Compressed = None, against: Against = None, data: DataName = None,
    skeleton: Skeleton = None, batch: BatchSize = 1, tokens: Tokens = 0, threads: Threads = 1,
    seconds: Seconds = 10.0, layers: Layers = False, json: JsonOut = None,
) -> None:  # fmt: skip
    """Time a network against its original, in turns.

    Give both, or a .lamina file that knows its original. With one thread the time is that of this
    process, so what other programs take does not count.
    """
    from lamina.cli_bench import compare

    compare(
        model, compressed, against, data, skeleton, batch=batch, tokens=tokens, threads=threads,
        seconds=seconds, layers=layers, out=json,
    )  # fmt: skip


@app.command(epilog=_examples("methods", "methods alds"))
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this method's whole card.")
    ] = None,
) -> None:
    """List the methods, or print one method's card."""
    from lamina.methods.base import find_method

    if name is None:
        return show.show_methods()
    show.say(show.card_of(find_method(name)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every error ends as one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] or ["--help"]
    if "--version" in words[:1]:
        from lamina._version import __version__

        show.say(f"lamina {__version__}")
        return 0
    if not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        command = typer.main.get_command(app)
        with command.make_context("lamina", words) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except (Exception, KeyboardInterrupt) as error:
        if debug and not hasattr(error, "format_message"):
            raise
        return show.explain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
