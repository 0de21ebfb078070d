"""What a pretrained model is for, and a small batch of the inputs it takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

TOKENS = 16  # of an example input
TIMED = 128  # of the one sample that a time is of
SOUND = 8_000  # samples of an example waveform: half a second
FRAMES = 64  # of an example spectrogram
# Classes that end so give scores; what ends in Model alone gives features.
HEADS = ("ForCausalLM", "LMHeadModel", "LMHead", "ForMaskedLM", "Classification", "MTModel",
         "ForConditionalGeneration", "ForCTC", "ForPreTraining")  # fmt: skip


def task_of(module: nn.Module) -> str:
    """Return what a `transformers` model is for: `"causal"`, `"masked"`, `"classify"`,
    `"seq2seq"`, `"image"`, `"audio"` or `"features"`."""
    name, config = type(module).__name__, module.config
    main = _main_input(module)
    if main == "pixel_values":
        return "image"
    if main in ("input_values", "input_features"):
        return "audio"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if name.endswith(("ForMaskedLM", "ForPreTraining")):
        return "masked"
    return "classify" if "Classification" in name else "features"


def loss_of(module: nn.Module) -> str:
    """Return what a `transformers` model's outputs are, as far as its class tells.

    Encoders of text that could have a masked language head are made for embeddings.
    """
    name = type(module).__name__
    if name.endswith(HEADS):
        return "logits"
    if not name.endswith(("Model", "Encoder")):
        return "auto"
    from transformers import AutoModelForMaskedLM

    known = type(module.config) in AutoModelForMaskedLM._model_mapping
    return "embedding" if known and task_of(module) == "features" else "features"


def example_of(module: nn.Module, rows: int = 2, tokens: int = TOKENS) -> dict[str, Any]:
    """Return a small batch of the inputs a `transformers` model takes, from a fixed seed.

    Args:
        module: the model.
        rows: samples.
        tokens: of a sample, where it reads text; at most half of what the model takes.
    """
    config: Any = module.config
    main = _main_input(module)
    takes = inspect.signature(module.forward).parameters
    draw = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    given: dict[str, Any] = {}
    if main == "input_ids":
        ids = _tokens(config, draw, (rows, tokens))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if main == "pixel_values" or _sees(config, takes):
        given["pixel_values"] = torch.randn(_image_shape(module, rows), generator=draw).to(dtype)
        if "input_ids" in takes and "input_ids" not in given:
            given["input_ids"] = _tokens(config, draw, (rows, tokens))
    if main in ("input_features", "input_values"):
        shape = (rows, *_sound_shape(config, main))
        given[main] = torch.randn(shape, generator=draw).to(dtype)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        given["decoder_input_ids"] = _tokens(config, draw, (rows, tokens))
    return given


def is_drawn(module: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether inputs are those that `example_of` draws, not somebody's own."""
    drawn = example_of(module)
    return set(given) == set(drawn) and all(torch.equal(given[n], x) for n, x in drawn.items())


def inner_configs(config: Any) -> list[Any]:
    """Return the configurations inside one, at every depth."""
    parts = [v for v in vars(config).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    return [*parts, *(deeper for part in parts for deeper in inner_configs(part))]


def setting(config: Any, name: str, otherwise: Any) -> Any:
    """Return a setting of a configuration, or of one inside it."""
    for part in (config, *inner_configs(config)):
        found = getattr(part, name, None)
        if found is not None:
            return found
    return otherwise


def _main_input(module: nn.Module) -> str:
    return str(getattr(module, "main_input_name", "input_ids"))


def _sees(config: Any, takes: Mapping[str, Any]) -> bool:
    """Whether images go beside the text, not at marked places in it, which may stay away."""
    if "pixel_values" not in takes or "input_ids" not in takes:
        return False
    marked = ("image_token_id", "image_token_index")
    return not any(isinstance(getattr(config, name, None), int) for name in marked)


def _image_shape(module: nn.Module, rows: int) -> tuple[int, ...]:
    config: Any = module.config
    side = setting(config, "image_size", 224)
    if isinstance(side, Mapping):
        side = [side.get("height", 224), side.get("width", 224)]
    high, wide = side if isinstance(side, (list, tuple)) else (side, side)
    image = int(setting(config, "num_channels", 3)), int(high), int(wide)
    frames = getattr(config, "num_frames", None)
    return (rows, int(frames), *image) if isinstance(frames, int) else (rows, *image)


def _sound_shape(config: Any, main: str) -> tuple[int, ...]:
    def number(name: str) -> int:
        return int(setting(config, name, 0) or 0)

    if main == "input_features":
        for width in ("feature_projection_input_dim", "input_feat_per_channel"):
            if number(width):
                return FRAMES, number(width)
        return number("num_mel_bins") or 80, 2 * (number("max_source_positions") or 1500)
    if number("num_mel_bins") and number("max_length"):
        return number("max_length"), number("num_mel_bins")
    if number("audio_channels"):
        return number("audio_channels"), SOUND
    return (SOUND,)


def _tokens(config: Any, draw: torch.Generator, shape: tuple[int, int]) -> torch.Tensor:
    most = int(setting(config, "max_position_embeddings", 512))
    size = int(setting(config, "vocab_size", 100))
    allowed = torch.ones(size, dtype=torch.bool)
    allowed[: min(5, size - 1)] = False
    for part in (config, *inner_configs(config)):  # tokens that stand for images, padding, ends
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")) and isinstance(value, int):
                allowed[value % size] = False
    ids = allowed.nonzero()[:, 0] if bool(allowed.any()) else torch.arange(size)
    shape = (shape[0], min(shape[1], max(2, most // 2)))
    return ids[torch.randint(0, len(ids), shape, generator=draw)]
