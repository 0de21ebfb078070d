"""After `import lamina.hf`, transformers opens folders that `lamina export --to lamina-hf` wrote.

    import lamina.hf
    from transformers import AutoModel

    model = AutoModel.from_pretrained("./folder")

The folder's `config.json` names the quantization method `lamina`; the import registers it in
transformers' own registry. The network's layers become those of the file before any weight is
loaded, so that nothing is missing. Nothing in a folder is executed.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.errors import MissingExtraError, NetworkError
from lamina.exporting.small import Small
from lamina.network.small_folders import METHOD, SMALL, check_told


def register() -> None:
    """Tell transformers about folders of Lamina's; a second time changes nothing.

    Raises:
        MissingExtraError: `transformers` is not installed, or older than its registry.
    """
    try:
        from transformers.core_model_loading import ConversionOps, WeightConverter
        from transformers.quantizers import HfQuantizer, auto
        from transformers.utils.quantization_config import QuantizationConfigMixin
    except ImportError as error:
        raise MissingExtraError(
            "transformers is not installed", "", f"or too old: {error}",
            "pip install -U 'lamina[hf]'",
        ) from None  # fmt: skip
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    class LaminaConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """What `config.json` says of a folder: `quant_method`, `format`, `by`."""

        def __init__(self, **told: Any) -> None:
            check_told(told)
            self.quant_method = METHOD
            self.format = told["format"]
            self.by = told.get("by", "")

    class HandOver(ConversionOps):  # type: ignore[misc]
        """Give transformers the tensors that were decoded, instead of the one that it has read."""

        def __init__(self, quantizer: LaminaQuantizer) -> None:
            self.hf_quantizer = quantizer  # transformers then leaves dtypes to this operation

        def __deepcopy__(self, memo: Any) -> HandOver:
            return self

        def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return self.hf_quantizer.small.take()

    class LaminaQuantizer(HfQuantizer):  # type: ignore[misc]
        """Loads the `.lamina` file of a folder; for inference and for training what is left."""

        small: Small

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self.asked: Any = None
            if not self.pre_quantized:
                raise NetworkError(
                    "transformers cannot compress with lamina", "quantization_config",
                    "it opens what lamina has compressed", "use lamina.compress",
                )  # fmt: skip

        def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
            places = device_map.values() if isinstance(device_map, dict) else [device_map]
            if "disk" in {str(place) for place in places}:
                raise NetworkError(
                    "a compressed network cannot be left on disk", f"device_map={device_map}",
                    "its tensors are decoded into memory", "use another device_map",
                )  # fmt: skip

        def update_attn_implementation(self, config: Any) -> Any:
            # The one hook that sees the configuration before the weights' file is looked for.
            config.transformers_weights = SMALL
            return config

        def update_dtype(self, dtype: Any) -> Any:
            # Where config.json names none, transformers has looked at the bytes of our file.
            self.asked = dtype if dtype.is_floating_point else torch.float32
            return self.asked

        def _process_model_before_weight_loading(
            self, model: Any, checkpoint_files: Any = None, **kwargs: Any
        ) -> None:
            self.small = Small.of(checkpoint_files, model, self.asked)

        def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
            # Our names are those of the network itself: no renaming of old checkpoints applies.
            return [WeightConverter(["^d$"], self.small.targets, [HandOver(self)], force_cpu=True)]

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            self.small.finish(model)
            model._weight_conversions = None  # ours has no way back
            return model

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            raise NetworkError(
                "transformers cannot save a compressed network", "save_pretrained",
                "it knows neither the layers nor the code of the file",
                "copy the folder, or write lamina.save(model, 'net.lamina')",
            )  # fmt: skip

        @property
        def is_trainable(self) -> bool:
            return True

    auto.register_quantization_config(METHOD)(LaminaConfig)
    auto.register_quantizer(METHOD)(LaminaQuantizer)


register()
