"""The check before storing is timed, with the kernels in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from logquant_vllm.bench import store
from logquant_vllm.bench.shapes import Shape
from logquant_vllm.config import LogQuantConfig
from tests.calibrations import feedback_of
from tests.pair import DEVICE


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("requests", "new", "completing"), [(3, 1, 0), (3, 1, 1), (2, 1, 2), (1, 150, 1)])
def test_check(monkeypatch: pytest.MonkeyPatch, requests: int, new: int, completing: int, calibrated: bool) -> None:
    """It passes as many groups as the case names, and fails where what is stored is not the reference's."""
    monkeypatch.setattr(store, "CONTEXT", 500)
    shape, layout = Shape(2, 2, 64), LogQuantConfig().layout(64)
    feedback = feedback_of(64, 2, dense=True)[0].to(DEVICE) if calibrated else None
    inputs = store.inputs_of(requests, new, completing, shape, layout, seed=0, device=DEVICE)
    group = layout.fmt.key_group_size
    assert (inputs.batch.seq_lens % group == 0).sum() == (completing if new == 1 else 0)
    before = inputs.cache.pages.clone()
    store.check(inputs, layout, feedback)
    assert torch.equal(inputs.cache.pages, before)
    monkeypatch.setattr(store.reference, "store_tokens", lambda *_: None)
    with pytest.raises(RuntimeError, match="not the reference's"):
        store.check(inputs, layout, feedback)
