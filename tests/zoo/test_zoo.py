"""The zoo: its registry, its trained weights, and that they score what was recorded."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from lamina.errors import NetworkError
from lamina.zoo import build, names, untrained, zoo

# `import lamina.zoo` may give the function of that name, so the module comes from sys.modules.
ZOO_MODULE = sys.modules["lamina.zoo"]
RECORDS = Path(__file__).parents[2] / "benchmarks" / "zoo"
TRAINED = [
    name
    for name in names()
    if files("lamina.zoo").joinpath("weights", f"{name}.safetensors").is_file()
]
DIGITS = [name for name in TRAINED if name.startswith("lenet")]  # whose data ships
OUTPUTS = {"gpt-tiny": (2, 128, 1024)}


def test_names() -> None:
    assert {"lenet-300-100", "lenet-5"} <= set(names()) and names() == sorted(names())
    assert {"resnet20", "small-cnn", "vgg16"} <= set(names())
    assert {"lenet-300-100", "lenet-5", "small-cnn"} <= set(TRAINED)


@pytest.mark.parametrize("name", names())
def test_build_is_seeded_and_leaves_the_random_state(name: str) -> None:
    before = torch.random.get_rng_state()
    one, two, other = build(name), build(name), build(name, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("name", DIGITS)
def test_accuracy_is_what_was_recorded(name: str) -> None:
    network = zoo(name)
    record = json.loads((RECORDS / f"{name}.json").read_text())
    assert sum(p.numel() for p in network.module.parameters()) == record["parameters"]
    for split in ("validation", "test"):
        loader = getattr(network.data, split)
        right = sum(int((network.forward(x).argmax(1) == y).sum()) for x, y in loader)
        accuracy = 100 * right / loader.dataset_size
        assert accuracy == pytest.approx(record["accuracy_percent"][split], abs=0.1)


@pytest.mark.parametrize("name", TRAINED)
def test_zoo_gives_a_complete_network(name: str) -> None:
    network = zoo(name)
    assert (network.source, network.name, network.loss) == (f"zoo:{name}", name, "logits")
    assert not network.module.training
    assert all(torch.isfinite(p).all() and p.requires_grad for p in network.module.parameters())
    assert network.forward(*network.example_inputs).shape == OUTPUTS.get(name, (2, 10))
    if name in DIGITS:
        assert network.data.train.dataset_size == 7_000
    else:
        assert network.data is None
        assert all(
            torch.equal(a, b)
            for a, b in zip(network.example_inputs, zoo(name).example_inputs, strict=True)
        )
    trained, fresh = next(network.module.parameters()), next(build(name).parameters())
    assert not torch.equal(trained, fresh)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_weights_are_those_of_the_record(name: str) -> None:
    record = json.loads((RECORDS / f"{name}.json").read_text())
    assert record["network"] == name
    assert record["parameters"] == sum(p.numel() for p in build(name).parameters())
    assert record["accuracy_percent"]["test"] > (30 if name == "gpt-tiny" else 80)  # of 1,024


@pytest.mark.parametrize("name", names())
def test_an_untrained_network_runs_on_its_example(name: str) -> None:
    network = untrained(name, seed=3)
    assert network.source == f"zoo:{name}" and not network.module.training
    pairs = zip(network.module.parameters(), build(name, seed=3).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert network.forward(*network.example_inputs).shape == OUTPUTS.get(name, (2, 10))
    assert (network.data is None) == (not name.startswith("lenet"))


def test_weights_that_do_not_ship_are_named_with_the_script_that_makes_them() -> None:
    with pytest.raises(NetworkError, match=r"benchmarks/zoo/train_fetched.py vgg16"):
        zoo("vgg16")


def test_two_openings_share_nothing() -> None:
    one, two = zoo("lenet-300-100"), zoo("lenet-300-100")
    with torch.no_grad():
        next(one.module.parameters()).zero_()
    assert next(two.module.parameters()).abs().sum() > 0
    iter(one.data.train)
    assert (one.data.train.epoch, two.data.train.epoch) == (1, 0)


@pytest.mark.parametrize("open_it", [build, zoo])
def test_unknown_name_lists_the_known(open_it: object) -> None:
    assert callable(open_it)
    with pytest.raises(NetworkError, match=r"'lenet-6'.*lenet-300-100, lenet-5"):
        open_it("lenet-6")


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One more file in the zoo's folder, as the registry sees it."""
    module = ModuleType("lamina.zoo.one_more")
    monkeypatch.setitem(sys.modules, "lamina.zoo.one_more", module)
    found = list(ZOO_MODULE.pkgutil.iter_modules(ZOO_MODULE.__path__))
    info = found[0]._replace(name="one_more")
    monkeypatch.setattr(ZOO_MODULE.pkgutil, "iter_modules", lambda path: [*found, info])
    ZOO_MODULE._entries.cache_clear()
    return module


@pytest.fixture(autouse=True)
def _forget() -> object:
    yield
    ZOO_MODULE._entries.cache_clear()


def test_adding_a_network_is_adding_a_file(one_more: ModuleType) -> None:
    one_more.ZOO = {"tiny": lambda: nn.Linear(2, 3)}
    assert "tiny" in names()
    assert isinstance(build("tiny"), nn.Linear)
    with pytest.raises(NetworkError, match="no trained weights"):
        zoo("tiny")


def test_a_file_without_networks_is_fine(one_more: ModuleType) -> None:
    assert "lenet-5" in names()


def test_a_name_given_twice_is_refused(one_more: ModuleType) -> None:
    one_more.ZOO = {"lenet-5": nn.Identity}
    with pytest.raises(NetworkError, match="lenet-5"):
        names()
