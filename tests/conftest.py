"""Profiles of hypothesis, and one thread a process: the tests run side by side."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=150, derandomize=True, database=None, **_common)
settings.register_profile("long", max_examples=1500, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
