"""Settings of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# the same examples in every run: a red test is news about the change at hand, and busy machines miss deadlines
settings.register_profile("logquant", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=400)  # pytest --hypothesis-profile=search
settings.load_profile("logquant")

# vLLM's CPU worker replaces this function by one that does nothing, so keep it from before any test
_set_num_threads = torch.set_num_threads


@pytest.fixture
def few_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, or a test's parameter ``threads``: on small tensors threads wait for each other most of the time."""
    before = torch.get_num_threads()
    parameters = getattr(request.node, "callspec", None)
    _set_num_threads(parameters.params.get("threads", 1) if parameters else 1)
    yield
    _set_num_threads(before)
