"""Forms: runtime layers and ways to hold values, free of any method's code."""

from lamina.forms.affine import Affine, find_affine
from lamina.forms.channels import Gather, check_indices
from lamina.forms.edit import BUILDERS, Edit, builder, find_tensor, install
from lamina.forms.half import build_bf16
from lamina.forms.input_quantized import build_input_quantized
from lamina.forms.integer import find_grid, grid_of
from lamina.forms.low_rank import GroupedLinear
from lamina.forms.merged import build_merged
from lamina.forms.narrow import widths
from lamina.forms.resized import sizes_of
from lamina.forms.rewritten import conv_weights, is_channels_last
from lamina.forms.tied import index_of
from lamina.forms.tucker import build_tucker
from lamina.forms.values import FORMS_OF_VALUES, Codebook, Grid, Plain, Sparse, Values

__all__ = [
    "BUILDERS",
    "FORMS_OF_VALUES",
    "Affine",
    "Codebook",
    "Edit",
    "Gather",
    "Grid",
    "GroupedLinear",
    "Plain",
    "Sparse",
    "Values",
    "build_bf16",
    "build_input_quantized",
    "build_merged",
    "build_tucker",
    "builder",
    "check_indices",
    "conv_weights",
    "find_affine",
    "find_grid",
    "find_tensor",
    "grid_of",
    "index_of",
    "install",
    "is_channels_last",
    "sizes_of",
    "widths",
]
