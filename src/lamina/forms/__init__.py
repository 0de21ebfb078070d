"""Forms: runtime layers and ways to hold values, free of any method's code."""

from lamina.forms.edit import BUILDERS, Edit, builder, find_tensor, install
from lamina.forms.low_rank import GroupedLinear
from lamina.forms.values import FORMS_OF_VALUES, Codebook, Grid, Plain, Sparse, Values

__all__ = [
    "BUILDERS",
    "FORMS_OF_VALUES",
    "Codebook",
    "Edit",
    "Grid",
    "GroupedLinear",
    "Plain",
    "Sparse",
    "Values",
    "builder",
    "find_tensor",
    "install",
]
