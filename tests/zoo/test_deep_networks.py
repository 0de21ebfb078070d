"""ViT, MLP-Mixer, GPT, MobileNetV2 and VGG-11: counted by hand, run, exported, and kept causal."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lamina.network.discover import discover
from lamina.network.sites import Sites
from lamina.zoo import build, untrained
from lamina.zoo.attention import MLP, Attention, Block, initialise
from lamina.zoo.gpt import GPT
from lamina.zoo.mobilenet import STAGES, InvertedResidual

NAMES = ["gpt-tiny", "mlp-mixer-tiny", "mobilenet-v2-tiny", "vgg11-bn", "vit-tiny"]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def mlp(width: int) -> int:
    return linear(width, 4 * width) + linear(4 * width, width)


def block(width: int) -> int:
    """A transformer block: two norms, four projections, an MLP."""
    return 2 * 2 * width + 4 * linear(width, width) + mlp(width)


def conv(inputs: int, outputs: int, kernel: int) -> int:
    """A convolution without bias, and its BatchNorm."""
    return kernel * kernel * inputs * outputs + 2 * outputs


def test_parameters_of_the_transformers() -> None:
    embed = linear(7 * 7, 96)
    vit = embed + 16 * 96 + 6 * block(96) + 2 * 96 + linear(96, 10)
    assert count(build("vit-tiny")) == vit == 678_538
    gpt = 1024 * 160 + 128 * 160 + 8 * block(160) + 2 * 160  # the head is the embedding
    assert count(build("gpt-tiny")) == gpt == 2_658_880
    mixer = embed + 6 * (2 * 2 * 96 + mlp(16) + mlp(96)) + 2 * 96 + linear(96, 10)
    assert count(build("mlp-mixer-tiny")) == mixer == 466_282


def test_parameters_of_the_convolutional_networks() -> None:
    widths = [3, 32, 64, 128, 128, 192, 192, 192, 192]
    features = sum(conv(a, b, 3) for a, b in pairwise(widths))
    classifier = linear(192, 2048) + linear(2048, 2048) + linear(2048, 10)
    assert count(build("vgg11-bn")) == features + classifier
    assert classifier > 0.7 * count(build("vgg11-bn")), "most of it is in the classifier"
    total, channels = conv(1, 16, 3), 16
    for width, blocks, _ in STAGES:
        for _ in range(blocks):
            hidden = 4 * channels
            total += conv(channels, hidden, 1) + conv(1, hidden, 3) + conv(hidden, width, 1)
            channels = width
    total += conv(channels, 160, 1) + linear(160, 10)
    assert count(build("mobilenet-v2-tiny")) == total


@pytest.mark.parametrize("name", NAMES)
def test_shapes_at_several_batches(name: str) -> None:
    network = untrained(name)
    (x,) = network.example_inputs
    shape = (128, 1024) if name == "gpt-tiny" else (10,)
    for n in (1, 3):
        given = x[:1].expand(n, *x.shape[1:])
        out = network.forward(given)
        assert out.shape == (n, *shape) and torch.isfinite(out).all()
        assert torch.allclose(out[0], out[-1], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_untrained_networks_have_inputs_of_their_kind(name: str) -> None:
    (x,) = untrained(name).example_inputs
    assert torch.equal(x, untrained(name, seed=3).example_inputs[0]), "they do not depend on it"
    if name == "gpt-tiny":
        assert x.dtype == torch.int64 and x.shape == (2, 128)
        assert int(x.min()) >= 0 and int(x.max()) < 1024 and len(x.unique()) > 150
    else:
        assert x.is_floating_point() and not torch.equal(x[0], x[1])
    before = torch.get_rng_state()
    untrained(name)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="module")
def found() -> dict[str, Sites]:
    return {name: discover(untrained(name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_network_exports(name: str, found: dict[str, Sites]) -> None:
    sites = found[name]
    assert sites.traced and sites.chains and sites.families
    names = {site.name for site in sites.layers}
    layers = {"gpt-tiny": 49, "mlp-mixer-tiny": 26, "mobilenet-v2-tiny": 27, "vgg11-bn": 11,
              "vit-tiny": 38}  # fmt: skip
    assert len(names) == layers[name]
    for span in (*sites.chains, *sites.families):
        assert set(span.members) <= names and len(span.members) >= 2


def test_every_mlp_is_a_chain_of_modules_and_every_role_a_family(found: dict[str, Sites]) -> None:
    for name, depth in (("vit-tiny", 6), ("gpt-tiny", 8), ("mlp-mixer-tiny", 6)):
        sites = found[name]
        for i in range(depth):
            chain = sites[f"blocks.{i}.mlp.fc1..blocks.{i}.mlp.fc2"]
            assert chain.between == (("gelu",),)
            assert chain.through == ((f"blocks.{i}.mlp.act",),)
        families = {family.name: family.members for family in sites.families}
        for role in ("mlp.fc1", "mlp.fc2"):
            assert families[f"blocks.*.{role}"] == tuple(f"blocks.{i}.{role}" for i in range(depth))
        assert ("blocks.*.attention.query" in families) == (name != "mlp-mixer-tiny")
    (head,) = [site for site in found["gpt-tiny"].layers if site.aliases]
    assert {head.weight, *head.aliases} == {"head.weight", "embed.weight"}
    assert not any(head.name in family.members for family in found["gpt-tiny"].families)


def test_the_classifier_of_vgg_is_a_chain(found: dict[str, Sites]) -> None:
    chain = next(c for c in found["vgg11-bn"].chains if "fc.0" in c.members)
    at = chain.members.index("fc.0")
    assert chain.members[at:] == ("fc.0", "fc.3", "fc.6")
    assert chain.between[at:] == (("relu", "dropout"), ("relu", "dropout")) or chain.between[
        at:
    ] == (("relu",), ("relu",))


# --- what they compute ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    network = GPT(width=24, depth=3, heads=2, vocabulary=50, context=16).eval().double()
    with torch.no_grad():
        for p in network.parameters():  # far from its initialisation, so that attention attends
            p.add_(0.3 * torch.randn_like(p))
    return network


def test_a_later_token_changes_nothing_before_it(gpt: GPT) -> None:
    tokens = torch.randint(50, (2, 12))
    before = gpt(tokens)
    for place in (0, 5, 11):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 7) % 50
        after = gpt(other)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])
        assert place == 11 or not torch.allclose(after[:, -1], before[:, -1])


def test_a_prefix_says_what_the_whole_says_there(gpt: GPT) -> None:
    tokens = torch.randint(50, (2, 12))
    torch.testing.assert_close(gpt(tokens[:, :7]), gpt(tokens)[:, :7])


def test_without_the_mask_later_tokens_would_show() -> None:
    """Negative control: the same attention, not causal."""
    torch.manual_seed(0)
    open_, causal = Attention(8, 2), Attention(8, 2, causal=True)
    causal.load_state_dict(open_.state_dict())
    x = torch.randn(1, 5, 8)
    other = x.clone()
    other[:, -1] += 1
    assert not torch.allclose(open_(x)[:, 0], open_(other)[:, 0])
    assert torch.equal(causal(x)[:, 0], causal(other)[:, 0])


def test_the_head_is_the_embedding_and_stays_it(gpt: GPT) -> None:
    assert gpt.head.weight is gpt.embed.weight
    names = dict(gpt.named_parameters())
    assert "embed.weight" in names and "head.weight" not in names
    again = GPT(width=24, depth=3, heads=2, vocabulary=50, context=16).double()
    again.load_state_dict(gpt.state_dict())
    assert again.head.weight is again.embed.weight
    tokens = torch.randint(50, (1, 6))
    assert torch.equal(again.eval()(tokens), gpt(tokens))


def test_attention_by_hand() -> None:
    torch.manual_seed(0)
    layer = Attention(6, 3, causal=True).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    q, k, v = (part(x).detach().numpy() for part in (layer.query, layer.key, layer.value))
    mixed = np.zeros((2, 4, 6))
    for n in range(2):
        for h in range(3):
            at = slice(2 * h, 2 * h + 2)
            for t in range(4):
                scores = k[n, : t + 1, at] @ q[n, t, at] / np.sqrt(2)
                share = np.exp(scores - scores.max())
                mixed[n, t, at] = share / share.sum() @ v[n, : t + 1, at]
    wanted = layer.out(torch.from_numpy(mixed))
    torch.testing.assert_close(layer(x), wanted)


def test_a_block_is_two_branches_beside_a_skip() -> None:
    torch.manual_seed(0)
    made = Block(8, 2).double().eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    y = x + made.attention(F.layer_norm(x, (8,), made.norm1.weight, made.norm1.bias))
    h = F.layer_norm(y, (8,), made.norm2.weight, made.norm2.bias)
    wanted = y + made.mlp.fc2(F.gelu(made.mlp.fc1(h)))
    torch.testing.assert_close(made(x), wanted)
    assert isinstance(made.mlp, MLP)


def test_a_mixer_mixes_tokens_and_features_in_turn() -> None:
    from lamina.zoo.mixer import MixerBlock

    torch.manual_seed(0)
    made = MixerBlock(3, 4).double().eval()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = x + made.across(made.norm1(x).mT).mT
    torch.testing.assert_close(made(x), y + made.mlp(made.norm2(y)))
    with torch.no_grad():
        made.across.fc2.weight.zero_()
        made.across.fc2.bias.zero_()
    other = x.clone()
    other[:, 0] += 1
    assert torch.equal(made(x)[:, 1:], made(other)[:, 1:]), "the second MLP stays in its token"


def test_inverted_residuals_skip_where_shapes_agree() -> None:
    torch.manual_seed(0)
    for inputs, outputs, stride, skips in ((4, 4, 1, True), (4, 4, 2, False), (4, 6, 1, False)):
        made = InvertedResidual(inputs, outputs, stride).eval()
        x = torch.randn(1, inputs, 6, 6)
        wanted = made.conv(x) + (x if skips else 0)
        assert torch.equal(made(x), wanted) and made.skip is skips
        depthwise = made.conv[3]
        assert depthwise.groups == depthwise.in_channels == 4 * inputs


def test_initialisation_is_that_of_gpt_2() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.Embedding(256, 256), nn.Conv2d(1, 4, 3))
    conv_before = net[2].weight.clone()
    initialise(net)
    for part in net[:2]:
        assert float(part.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not net[0].bias.any() and torch.equal(net[2].weight, conv_before)
