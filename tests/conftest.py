"""One thread, fixed seeds, and how hard hypothesis tries: the same for every test."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# The order of a threaded sum is not fixed, and bit-exactness is tested.
torch.set_num_threads(1)

# No deadlines, no slowness check: a busy machine must not fail a test. In CI the examples are the
# same at every run, so that a red run is red because of the change.
settings.register_profile(
    "lamina",
    deadline=None,
    max_examples=50,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lamina")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed every generator before each test, so that no test depends on the ones before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
