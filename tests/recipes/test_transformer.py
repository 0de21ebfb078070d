"""int4-2:4: phases in order, the three ratios, and a file that is the trained network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.train.quantizable import Tiny, make_data, make_network

import lamina
from lamina.artifact import restore, unpack
from lamina.errors import MethodError
from lamina.forms import Edit, Grid, Sparse, find_tensor
from lamina.measure.quality import evaluate
from lamina.measure.stats import Stats
from lamina.methods.two_four import in_fours
from lamina.network.discover import discover
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan import Budget, apply
from lamina.recipes import RECIPES, recipe_named
from lamina.recipes.ratios import bits_of, is_two_four, ratios
from lamina.recipes.transformer import IntTwoFour, backbone
from lamina.stages import Way, packed
from lamina.train.quantizing import Tuning

TUNING = Tuning(lr=3e-3, range_lr=1e-2, dropout=None)
QUICK = IntTwoFour((("dense", 3.0), ("sparse", 1.0), ("both", 3.0)), tuning=TUNING, dense_lr=3e-3)


def follow(recipe: IntTwoFour, labels: bool = True, network: Network | None = None):
    network = network or make_network()
    way = Way(network, make_data(labels), Budget.parse("100%"))
    sites = discover(network)
    return recipe.follow(way, sites, Stats()), way, sites


@pytest.fixture(scope="module")
def whole():
    return follow(QUICK)


def test_it_ends_accurate_in_four_bits_and_two_of_four(whole) -> None:
    followed, way, sites = whole
    layers = backbone(sites)
    assert len(layers) == 12
    held = {e.path: e.values for e in followed.final.edits if e.form == "values"}
    for site in layers:
        values = held[site.weight]
        assert isinstance(values, Grid)
        assert bits_of(values) == 4
        four = in_fours(site, values.dense()).reshape(-1, 4)
        assert bool(((four == 0).sum(1) >= 2).all())
        low, high = (getattr(followed.final.model.get_submodule(site.module), n) for n in
                     ("low", "high"))  # fmt: skip
        assert high - low == 15
    test = make_data().test
    assert evaluate(followed.final.model, test, "accuracy") > 85
    assert followed.settings["quality"]["final"] > 85
    assert {row["phase"] for row in followed.history} == {0.0, 1.0, 2.0}
    steps = [row["step"] for row in followed.history]
    assert steps == sorted(set(steps))
    assert way.network.digest() == make_network().digest()


def test_the_file_is_the_trained_network(whole) -> None:
    followed, _, _ = whole
    file = packed(followed.final, followed.plan)
    loaded = restore(unpack(file), Tiny()).eval()
    ids = torch.randint(24, (9, 8))
    assert torch.equal(loaded(ids), followed.final.model.eval()(ids))
    notes = " ".join(followed.notes)
    assert "stay in high precision" in notes
    assert f"({len(file):,} bytes in the file" in notes


def test_three_ratios_are_printed(whole) -> None:
    followed, way, sites = whole
    (line,) = [n for n in followed.notes if n.startswith("Ratios")]
    assert "16.0x for the values" in line
    layers = backbone(sites)
    count = sum(find_tensor(way.network.module, s.weight).numel() for s in layers)
    indices = 32 * count / (3 * count + 32 * len(layers))  # 12 bits of 4 weights, and a step
    assert f"{indices:.1f}x with 2-bit indices" in line
    (text,) = ratios(way.network, layers, followed.final.edits, 1000)
    tensors = sum(p.numel() * 4 for p in way.network.module.parameters())
    assert f"{tensors / 1000:.1f}x for the whole" in text


def test_ratios_at_scale_are_the_papers_and_the_true_one() -> None:
    """16x counts no indices; 12 bits for 128 is 10.7x."""
    layer = torch.nn.Linear(256, 256)
    root = torch.nn.Module()
    root.layers = torch.nn.ModuleList([torch.nn.Sequential(layer)])
    site = Site("layers.0.0", module="layers.0.0", weight="layers.0.0.weight", shape=(256, 256))
    g = torch.Generator().manual_seed(0)
    symbols = torch.randint(1, 8, (256, 256), generator=g, dtype=torch.int32)
    symbols[:, 0::4] = symbols[:, 1::4] = 0
    edit = Edit(site.weight, "values", values=Grid(symbols, 0.1))
    (text,) = ratios(Network(root), [site], [edit], 10_000)
    assert text.startswith("Ratios: 16.0x for the values of the blocks' layers, 10.7x with")
    symbols[0, 0:2] = 1  # one four that has three: no indices, and every value counts
    assert not is_two_four(site, symbols.float()[:, :])
    (text,) = ratios(Network(root), [site], [edit], 10_000)
    assert "8.0x for the values of the blocks' layers, 8.0x with" in text


def test_the_plan_can_be_applied_again_without_training(whole) -> None:
    followed, way, sites = whole
    edited = apply(way.network, followed.plan, sites, Stats())
    for site in backbone(sites):
        decision = followed.plan.sites[site.name]
        assert [s.method for s in decision.steps] == ["two_four", "sawb"]
        weight = find_tensor(edited.model, site.weight)
        assert is_two_four(site, weight)
        assert len(torch.unique(weight)) <= 15
    assert followed.plan.sites["table"].steps[0].method == "rdoq"
    assert followed.plan.sites["head"].steps[0].method == "keep"


def test_without_labels_it_learns_from_the_original() -> None:
    first, _, _ = follow(IntTwoFour((("dense", 3.0), ("sparse", 0.0)), dense_lr=3e-3, tables=0.0))
    network = replace(make_network(), module=first.final.model)
    recipe = replace(QUICK, phases=(("both", 3.0),))
    followed, _, _ = follow(recipe, labels=False, network=Network(
        network.module, network.example_inputs, loss="logits"))  # fmt: skip
    assert evaluate(followed.final.model, make_data().test, "accuracy") > 75


@pytest.mark.parametrize("phase", ["sparse", "quantized"])
def test_halves(phase: str) -> None:
    followed, _, sites = follow(replace(QUICK, phases=((phase, 1.0),), tables=0.0))
    held = {e.path: e.values for e in followed.final.edits if e.form == "values"}
    site = backbone(sites)[0]
    assert isinstance(held[site.weight], Sparse if phase == "sparse" else Grid)
    assert is_two_four(site, held[site.weight].dense()) == (phase == "sparse")
    forms = {e.form for e in followed.final.edits}
    assert ("input_quantized" in forms) == (phase == "quantized")
    methods = [s.method for s in followed.plan.sites[site.name].steps]
    assert methods == (["two_four", "keep"] if phase == "sparse" else ["sawb"])


def test_where_it_begins_is_an_option() -> None:
    """From the pretrained weights masks are theirs, and the teacher is the dense network."""
    masks = []
    for start in ("finetuned", "pretrained"):
        recipe = replace(
            QUICK, phases=(("dense", 3.0), ("both", 0.0)), start=start, tables=0.0,
            score="magnitude",
        )  # fmt: skip
        followed, way, sites = follow(recipe)
        site = backbone(sites)[0]
        values = {e.path: e.values for e in followed.final.edits}[site.weight]
        masks.append(values.symbols != 0)
    from lamina.methods.two_four import mask_of

    pretrained = mask_of(site, find_tensor(way.network.module, site.weight).detach().abs())
    assert bool((masks[1] <= pretrained).all())
    assert not bool((masks[0] <= pretrained).all())


def test_it_is_a_recipe_of_compress(tmp_path) -> None:
    assert RECIPES["int4-2:4"] is IntTwoFour
    assert recipe_named("int4-2:4").bits == 4
    result = lamina.compress(make_network(), data=make_data(), recipe=replace(
        QUICK, phases=(("both", 1.0),)))  # fmt: skip
    assert any("Ratios" in note for note in result.report.facts["notes"])
    result.save(tmp_path / "n.lamina")
    loaded = lamina.load(tmp_path / "n.lamina", Tiny())
    ids = torch.randint(24, (4, 8))
    assert torch.equal(loaded.eval()(ids), result.model.eval()(ids))


def test_saliency_of_inputs_needs_statistics() -> None:
    with pytest.raises(MethodError, match=r"layers\.0\.query.*calibration"):
        follow(replace(QUICK, score="obd"))
    result = lamina.compress(make_network(), data=make_data(), recipe=replace(
        QUICK, phases=(("both", 1.0),), score="obd", rows=True, kind="symmetric", begin="mse",
        clip="mse"))  # fmt: skip
    assert any("Ratios" in note for note in result.report.facts["notes"])


def test_what_is_pruned_in_order_begins_nearer() -> None:
    """Without training: masks and grids that make up for each other, against magnitudes."""
    ids = make_data().test[0][0]
    away = {}
    for score in ("magnitude", "obs"):
        for phase in ("sparse", "quantized", "both"):
            recipe = replace(QUICK, phases=((phase, 0.0),), score=score, tables=0.0)
            followed, way, sites = follow(recipe)
            with torch.no_grad():
                want, got = way.network.module(ids), followed.final.model(ids)
            away[score, phase] = float((got - want).square().mean())
            if phase != "quantized":
                held = {e.path: e.values for e in followed.final.edits if e.form == "values"}
                assert all(is_two_four(s, held[s.weight].dense()) for s in backbone(sites))
    for phase in ("sparse", "both"):
        assert away["obs", phase] < 0.8 * away["magnitude", phase], away


def test_which_layers_are_inside_blocks() -> None:
    def site(name: str, **more: object) -> Site:
        return Site(name, module=name, weight=f"{name}.weight", **more)

    inside = [site("enc.layer.0.q"), site("enc.layer.0.ffn.out"), site("h.11.c_attn")]
    others = [site("pooler"), site("0"), site("layer.0.conv", op="conv"),
              site("layer.0.head", aliases=("table.weight",))]  # fmt: skip
    sites = Sites((*inside, *others))
    assert backbone(sites) == inside
    assert backbone(sites, ("enc.*",)) == inside[2:]


def test_bad_settings_are_named() -> None:
    for settings, why in (
        ({"phases": (("dense", 1.0),)}, "dense training comes first"),
        ({"phases": (("both", 1.0), ("dense", 1.0))}, "dense training comes first"),
        ({"phases": (("prune", 1.0),)}, "'prune'"),
        ({"phases": ("both",)}, "a name and epochs"),
        ({"start": "random"}, "'random'"),
        ({"bits": 5}, "5"),
        ({"activations": 1}, "no such width"),
        ({"tables": -1.0}, "tables"),
        ({"phases": (("both", -1.0),)}, "epochs"),
        ({"score": "obs", "tuning": Tuning(masks="gradual")}, "go by magnitude"),
    ):
        with pytest.raises(MethodError, match=why):
            IntTwoFour(**settings)
    plain = Network(torch.nn.Sequential(torch.nn.Linear(8, 3)), (torch.zeros(1, 8),))
    with pytest.raises(MethodError, match="numbered blocks"):
        follow(QUICK, network=plain)
