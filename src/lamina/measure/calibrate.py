"""One streaming pass over calibration data: what each layer sees, what the loss feels of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lamina.data import as_data, size_of
from lamina.errors import DataError
from lamina.measure.columns import (
    counted,
    gradient_columns,
    input_columns,
    main_tensor,
    role_of,
    token_counts,
)
from lamina.measure.cross import measure_cross
from lamina.measure.forward import Batch, at_rest, batches, call, device_of
from lamina.measure.loss import Loss, decide_loss, pick_temperature, pseudo_loss
from lamina.measure.moments import Moment, add_columns, empty_moment, is_finite, layer_stats
from lamina.measure.probe import Probe, collect_probe, first_of, measure_scale, probe_size, unit_of
from lamina.measure.stats import LayerStats, Stats, diagonal_of
from lamina.measure.tied import combine_uses
from lamina.measure.tokens import expected_counts, relative_power
from lamina.network.sites import Site, Sites
from lamina.network.source import Network, main_output

# A layer looks at this many columns per unit of width, at least and at most, over the whole pass:
# sampling noise of a moment falls with columns over width, its cost rises with both.
COLUMNS_PER_WIDTH, FEWEST, MOST = 64, 32_000, 200_000
LOOKUP = "lookup"  # role: a table of embeddings that is a head as well
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Watch:
    """One layer, as one module's calls show it."""

    site: Site
    path: str
    role: str


def calibrate(
    network: Network,
    sites: Sites,
    data: Any,
    *,
    samples: int = 1000,
    seed: int = 0,
    loss: str = "auto",
    probe: bool = True,
    temperature: float | None = None,
    cross: bool = True,
    progress: Progress | None = None,
) -> Stats:
    """Measure every layer's input and output-gradient second moments in one pass.

    Gradients are of a loss made from the network's own outputs (see `measure/loss.py`); labels
    never enter them. The pass runs in evaluation mode on the module's own device, keeps one batch
    alive, and leaves the module bit-identical.

    A weight that is head and table of embeddings at once has both uses in its statistics
    (`measure/tied.py`). What cannot be seen is approximated, and the probe sets its scale: the
    inner weights of recurrent layers (gates: gradients by the output's mean power; states of inner
    layers: by the identity), the input projection of attention (gradients likewise), its output
    projection (inputs: the projected values), layers that are only used raw (the identity on both
    sides).

    Args:
        network: what to measure; `network.loss` decides where `loss` is `"auto"`.
        sites: its sites; layer sites are measured.
        data: batches, or anything `lamina.data.as_data` takes with a calibration split.
        samples: how many samples to look at.
        seed: of the sampled labels, of positions left out, of probes.
        loss: `"logits"`, `"features"`, `"embedding"` or `"auto"`.
        probe: fix every layer's scale by one measured perturbation (`measure/probe.py`).
        temperature: that softens logits; None: 1 without a probe, with one as much as the outputs
            need (see `measure/loss.py`).
        cross: measure what neighbours have in common, which only methods that span layers ask for.
        progress: called as `progress(phase, done, total)`; phases `"calibrate"`, `"probe"`.

    Returns:
        Stats with one LayerStats per layer site, and what neighbours of a chain have in common
        (`measure/cross.py`), on the CPU.

    Raises:
        DataError: no data, batches the network does not take, non-finite activations or
            gradients (the layer is named).
        NetworkError: the network returns no tensor.

    Example:
        >>> net = Network(nn.Linear(3, 2), (torch.zeros(1, 3),))
        >>> site = Site("fc", module="", weight="weight", bias="bias", shape=(2, 3))
        >>> stats = calibrate(net, Sites((site,)), [torch.ones(8, 3)], probe=False)
        >>> stats.of("fc").H[0, 0]
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    loader = getattr(as_data(data), "calibration", None)
    if loader is None:
        raise DataError("no calibration data", "data", "", "give an iterable of batches")
    if samples < 1:
        raise DataError("too few samples", str(samples), "", "calibrate on at least 1")
    module = network.module
    samples = min(samples, _known_size(loader, samples))
    pass_ = _Pass(module, sites.layers, samples, seed)
    kind = loss if loss != "auto" else network.loss
    decided: Loss | None = None
    probes: list[Probe] = []
    room = probe_size(sites.layers) if probe else 0
    seen = 0
    with at_rest(module, seed=seed):
        for batch in batches(module, loader, samples):
            raw, output = pass_.forward(batch, network.example_inputs)
            if decided is None:
                decided = decide_loss(kind, raw, output, batch.labels)
                if temperature is None:
                    temperature = pick_temperature(decided, output) if probe else 1.0
                decided = decided.soft(temperature)
            pass_.backward(decided, output, batch)
            seen += batch.size
            if room > 0:
                probes += collect_probe(batch, output, room)
                room -= sum(p.batch.size for p in probes[-1:])
            if progress is not None:
                progress("calibrate", seen, samples)
            del raw, output
    assert decided is not None
    layers, blind, notes = pass_.finish(seen)
    if decided.temperature != 1:
        notes = (*notes, f"logits softened by a temperature of {decided.temperature:g}")
    if probe and probes:
        predictions = decided.predictions(probes[0].reference)
        probes = first_of(probes, probe_size(sites.layers, layers, predictions))
        readings = {}
        with at_rest(module, seed=seed):
            for done, site in enumerate(sites.layers, 1):
                # A guessed moment has no size that could be trusted, so none is ruled out.
                guessed = site.name in blind or role_of(module, site)[1] != "direct"
                limits = (1e-12, 1e12) if guessed else (1e-3, 1e3)
                readings[site.name] = measure_scale(
                    module, site, layers[site.name], probes, decided, seed=seed, limits=limits
                )
                if progress is not None:
                    progress("probe", done, len(sites.layers))
        unit = unit_of(list(readings.values()))
        layers = {name: s.with_scale(readings[name].scale * unit) for name, s in layers.items()}
    links = measure_cross(network, sites, _again(loader, samples), samples, seed) if cross else {}
    return Stats(layers, seen, decided.kind, network.digest(), notes, links)


def _again(loader: Iterable[Any], samples: int) -> Iterable[Any]:
    """Return batches for a second pass; an iterator has been used up by the first."""
    return () if iter(loader) is loader else loader


def _known_size(loader: Any, otherwise: int) -> int:
    """How many samples a loader holds, where that can be told without going through it."""
    if isinstance(loader, (list, tuple)):
        return sum(size_of(batch) for batch in loader)
    sized = getattr(loader, "dataset_size", None)
    if sized is None:
        try:
            sized = len(loader.dataset)
        except (AttributeError, TypeError):
            return otherwise
    return int(sized) if sized > 0 else otherwise


class _Pass:
    """The hooks of one pass and the sums they fill; nothing of it outlives `calibrate`."""

    def __init__(
        self, module: nn.Module, layers: tuple[Site, ...], samples: int, seed: int
    ) -> None:
        self.module, self.layers, self.samples = module, layers, samples
        self.labels = torch.Generator().manual_seed(seed)
        self.positions = torch.Generator().manual_seed(seed + 1)
        self.watches: dict[str, list[Watch]] = {}
        self.inputs: dict[str, Moment] = {}
        self.gradients: dict[str, Moment] = {}
        self.tables: set[str] = set()  # heads that are tables of embeddings as well
        self.powers: dict[str, Tensor] = {}  # squared gradients at each token of a table
        self.taps: list[tuple[str, Tensor, Tensor | None]] = []  # with what was looked up
        self.index: Tensor | None = None
        self.size = 1
        self.mask: Tensor | None = None  # of the batch at hand
        device = device_of(module)
        for site in layers:
            groups, rows, columns = site.matrix_shape
            one_hot = site.op == "embedding"
            if one_hot and role_of(module, site)[1] == "direct":
                self.powers[site.name] = torch.zeros(columns, dtype=torch.float64, device=device)
            self.inputs[site.name] = empty_moment(groups, columns, device, one_hot)
            self.gradients[site.name] = empty_moment(groups, rows, device, False)
            for watch in _watches(module, site):
                self.watches.setdefault(watch.path, []).append(watch)
                if watch.role == LOOKUP:  # seen as an embedding, its rows and columns trade places
                    self.tables.add(site.name)
                    self.powers[_table(site)] = torch.zeros(
                        rows, dtype=torch.float64, device=device
                    )
                    self.inputs[_table(site)] = empty_moment(1, rows, device, True)
                    self.gradients[_table(site)] = empty_moment(1, columns, device, False)

    def forward(self, batch: Batch, example: tuple[Any, ...]) -> tuple[Any, Tensor]:
        """Run one batch with a graph; fills the input moments and the taps."""
        self.taps, self.size, self.mask = [], batch.size, batch.mask
        handles = [
            self.module.get_submodule(path).register_forward_hook(
                self._hook(path), with_kwargs=True
            )
            for path in self.watches
        ]
        try:
            with torch.enable_grad():
                raw = call(self.module, batch, example)
        finally:
            for handle in handles:
                handle.remove()
        output = main_output(raw)
        if output.dim() == 0 or output.shape[0] != batch.size:
            raise DataError(
                "outputs do not match the batch",
                f"output {list(output.shape)}, {batch.size} samples",
                "dimension 0 of an output must be the sample",
                "wrap the network so that it returns one row a sample",
            )
        if not bool(output.detach().isfinite().all()):
            raise DataError("non-finite values", "the network's output", "", "check its weights")
        return raw, output

    def backward(self, loss: Loss, output: Tensor, batch: Batch) -> None:
        """Take the sampled loss's gradient at every tap; fills the gradient moments."""
        if not output.requires_grad or not self.taps:
            return
        with torch.enable_grad():
            scalar = pseudo_loss(loss, output, self.labels, batch.mask)
        taps, self.taps = self.taps, []
        found = torch.autograd.grad(scalar, [y for _, y, _ in taps], allow_unused=True)
        for (path, y, index), grad in zip(taps, found, strict=True):
            grad = torch.zeros_like(y) if grad is None else grad
            for watch in self.watches[path]:
                name = _table(watch.site) if watch.role == LOOKUP else watch.site.name
                width = self.gradients[name].first.shape[1]
                parts = gradient_columns(
                    watch.site, watch.role, grad, width, self._limit(width), self.positions,
                    batch.mask,
                )  # fmt: skip
                self.gradients[name] = add_columns(self.gradients[name], parts)
                if name in self.powers and index is not None:
                    self._feel(name, counted(grad, batch.mask), counted(index, batch.mask))
                if not is_finite(self.gradients[name]):
                    raise DataError(
                        "non-finite gradients",
                        f"layer {watch.site.name!r}",
                        "the network overflows here",
                        "use a wider dtype or other data",
                    )

    def _feel(self, name: str, grad: Tensor, index: Tensor) -> None:
        """Add the squared gradients at the tokens that were looked up."""
        if grad.shape[:-1] == index.shape:  # a bag's tokens have no gradient of their own
            power = grad.detach().double().square().sum(-1)
            self.powers[name].index_add_(0, index.reshape(-1).long(), power.reshape(-1))

    def finish(self, seen: int) -> tuple[dict[str, LayerStats], set[str], tuple[str, ...]]:
        """Return every layer's statistics, the layers nothing was seen of, and notes on these."""
        stats: dict[str, LayerStats] = {}
        for site in self.layers:
            name = site.name
            stats[name] = layer_stats(self.inputs.pop(name), self.gradients.pop(name), seen)
            if name in self.tables:
                table = _table(site)
                looked_up = layer_stats(self.inputs.pop(table), self.gradients.pop(table), seen)
                stats[name] = combine_uses(stats[name], self._weighed(table, looked_up, seen))
            elif name in self.powers:
                stats[name] = self._weighed(name, stats[name], seen)
        powers = [float(diagonal_of(s.G).mean()) for s in stats.values() if s.G.numel()]
        usual = math.fsum(powers) / len(powers) if powers and any(powers) else 1.0
        blind, notes = set(), []
        for name, s in stats.items():
            unseen = [side for side, m in (("inputs", s.H), ("gradients", s.G)) if not m.any()]
            if not unseen:
                continue
            # Not zero: then any damage here would look free. The probe tells what it is worth.
            H = _identity(s.H, 1.0) if "inputs" in unseen else s.H
            G = _identity(s.G, usual) if "gradients" in unseen else s.G
            stats[name] = replace(s, H=H, G=G)
            blind.add(name)
            notes.append(f"{name}: no {' and no '.join(unseen)} seen, the identity stands in")
        return stats, blind, tuple(notes)

    def _weighed(self, name: str, stats: LayerStats, seen: int) -> LayerStats:
        """Return a table's statistics: counts to be expected, by how much each token is felt."""
        counts = (stats.H * seen).round()
        power = relative_power(counts[0], self.powers[name].cpu())
        return replace(stats, H=expected_counts(counts) * power / seen)

    def _limit(self, width: int) -> int:
        whole = min(MOST, max(FEWEST, COLUMNS_PER_WIDTH * width))
        return max(1, whole * self.size // max(self.samples, self.size))

    def _hook(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> Any:
            self.index = None
            for watch in self.watches[path]:
                self._see(watch, module, args, kwargs, output)
            y = main_tensor(output)
            if y is None or y.is_inference() or not torch.is_grad_enabled():
                return None
            if not y.requires_grad:
                y = y.detach().requires_grad_()  # frozen so far: the graph begins here
            self.taps.append((path, y, self.index))
            # What follows gets a copy: it may write into it, and `y` must stay what it was.
            return _replaced(output, y.clone())

        return hook

    def _see(
        self, watch: Watch, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        site = watch.site
        name = _table(site) if watch.role == LOOKUP else site.name
        moment = self.inputs[name]
        if watch.role == LOOKUP or (site.op == "embedding" and watch.role == "direct"):
            index = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            self.index = index.detach()
            index = counted(index, self.mask)
            counts = token_counts(site, index)
            moment.total.add_(counts.to(moment.total.device))
            moment.first.add_(counts.to(moment.first.device))
            self.inputs[name] = replace(moment, count=moment.count + index.numel())
            return
        limit = self._limit(moment.first.shape[1])
        parts = input_columns(
            site, watch.role, module, args, kwargs, output, limit, self.positions, self.mask
        )
        with torch.no_grad():
            self.inputs[name] = add_columns(moment, parts)
        if not is_finite(self.inputs[name]):
            raise DataError(
                "non-finite values",
                f"the input of layer {name!r}",
                "the data or a layer before it holds NaN or infinity",
                "check data and weights",
            )


def _watches(module: nn.Module, site: Site) -> list[Watch]:
    """Where a layer can be seen: its own module, and tied modules of the same kind."""
    path, role = role_of(module, site)
    found = [Watch(site, path, role)]
    own = type(module.get_submodule(site.module))
    for alias in site.aliases:
        other = alias.rpartition(".")[0]
        try:
            kind = type(module.get_submodule(other))
        except AttributeError:
            continue
        if role != "direct" or other in {w.path for w in found}:
            continue
        if kind is own:
            found.append(Watch(site, other, role))
        elif issubclass(kind, nn.Embedding) and site.op == "linear" and not site.transposed:
            found.append(Watch(site, other, LOOKUP))
    return found


def _table(site: Site) -> str:
    """Return what a head's use as a table of embeddings is kept under."""
    return f"{site.name} as a table"


def _replaced(output: Any, tensor: Tensor) -> Any:
    """Return a layer's output with its main tensor exchanged."""
    if isinstance(output, PackedSequence):
        return output._replace(data=tensor)
    if isinstance(output, (tuple, list)):
        return type(output)([_replaced(output[0], tensor), *output[1:]])
    return tensor


def _identity(like: Tensor, power: float) -> Tensor:
    if like.dim() == 2:
        return torch.full_like(like, power)
    return power * torch.eye(like.shape[-1], dtype=like.dtype).expand_as(like).clone()
