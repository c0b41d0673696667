"""Properties of the quantizer and of the packing."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.quantizer import (
    FP16_TINY,
    dequantize,
    dequantize_values,
    dequantized_zero,
    pack,
    quantize,
    quantize_key_group,
    quantize_value_group,
    unpack,
)
from tests.paging import random_qkv

formats = st.builds(
    PageFormat,
    head_size=st.sampled_from([16, 64, 80, 96, 128, 256]),
    key_bits=st.sampled_from([2, 3, 4]),
    value_bits=st.sampled_from([2, 3, 4]),
    key_group_size=st.sampled_from([32, 64, 128]),
    value_group_size=st.sampled_from([32, 64, 128]),
    scale_bits=st.sampled_from([8, 16]),
    range_shrink=st.sampled_from([0.8, 0.9, 1.0]),
)
bits = st.sampled_from([2, 3, 4])
scale_bits = st.sampled_from([8, 16])
seeds = st.integers(0, 2**31)


def gaussian(seed: int, *shape: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + offset


@given(fmt=formats, seed=seeds)
def test_packing_round_trip(fmt: PageFormat, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    shape = (2, fmt.key_group_size, fmt.head_size)
    keys = torch.randint(0, 1 << fmt.key_bits, shape, generator=g, dtype=torch.int32)
    values = torch.randint(0, 1 << fmt.value_bits, shape, generator=g, dtype=torch.int32)
    for rows, planes, words in ((keys, fmt.key_planes, 1), (values.mT, fmt.value_planes, fmt.groups_per_page)):
        packed = pack(rows, planes)
        assert [x.shape for x in packed] == [(*rows.shape[:2], plane.words // words) for plane in planes]
        assert torch.equal(unpack(packed, planes), rows)


@given(fmt=formats, token=st.integers(0, 31), channel=st.integers(0, 15))
def test_packing_places_codes_as_documented(fmt: PageFormat, token: int, channel: int) -> None:
    codes = torch.zeros(fmt.key_group_size, fmt.head_size, dtype=torch.int32)
    codes[token, channel] = 5
    for rows, planes, bits, row, code in (
        (codes, fmt.key_planes, fmt.key_bits, token, channel),
        (codes.T, fmt.value_planes, fmt.value_bits, channel, token),
    ):
        for words, plane in zip(pack(rows, planes), planes, strict=True):
            n = words.shape[1]
            stored = 5 % (1 << bits) >> plane.shift & ((1 << plane.bits) - 1)
            assert int(words[row, code % n]) & 0xFFFF == stored << plane.bits * (code // n)
            assert int((words != 0).sum()) == int(stored > 0)


@given(
    bits=bits,
    scale_bits=scale_bits,
    seed=seeds,
    scale=st.floats(0.05, 100),
    offset=st.floats(-3, 3),
    shrink=st.sampled_from([0.8, 0.9, 1.0]),
)
def test_error_bound(bits: int, scale_bits: int, seed: int, scale: float, offset: float, shrink: float) -> None:
    """Within what the codes reach: half a step. Beyond: the distance to the nearest end."""
    x = gaussian(seed, 64, 32, scale=scale, offset=offset * scale)
    q = quantize(x, 0, bits, scale_bits, shrink)
    step, zero = q.scale.float(), dequantized_zero(q.scale, q.zero)
    top = zero + step * ((1 << bits) - 1)
    error = (dequantize(q, 0) - x).abs()
    inside = (x >= zero) & (x <= top)
    rounding = 1e-5 * x.abs().max()
    assert (error <= torch.where(inside, step / 2, torch.maximum(zero - x, x - top)) + rounding).all()
    # the reach is the shrunk range: e4m3 rounds the step by up to 1/16, by 2**-10 below 2**-6; the zero by 1/8 step
    wanted = (x.amax(0) - x.amin(0)) * shrink / ((1 << bits) - 1)
    middle = (x.amax(0) + x.amin(0)) / 2
    allowed = (wanted / 16).clamp(min=2.0**-10) if scale_bits == 8 else wanted / 1024
    assert ((step - wanted).abs() <= allowed).all()
    assert (((top + zero) / 2 - middle).abs() <= step * (0.13 if scale_bits == 8 else 0.02)).all()


@given(bits=bits, scale_bits=scale_bits, value=st.floats(-2000, 2000, width=32))
def test_constant_groups(bits: int, scale_bits: int, value: float) -> None:
    q = quantize(torch.full((64, 1), value), 0, bits, scale_bits, 0.9)
    read = dequantize(q, 0)
    assert read.unique().numel() == 1
    # 8 bits keep a constant to about half a code of a scale that fits its zero in int8; float16 keeps it itself
    tolerance = abs(value) * (0.03 if scale_bits == 8 else 1e-3) + (2.0**-9 if scale_bits == 8 else FP16_TINY)
    assert (read - value).abs().max() <= tolerance
    assert q.zero.float().abs().max() < (127 if scale_bits == 8 else 65504)


@given(bits=bits, seed=seeds, ratio=st.floats(0, 1e4), sign=st.sampled_from([-1, 1]))
def test_the_zero_never_saturates(bits: int, seed: int, ratio: float, sign: int) -> None:
    """However far a group lies from 0, its 8-bit zero fits and its values come back to a few per cent."""
    x = gaussian(seed, 64, 8, scale=0.1, offset=sign * ratio * 0.1)
    q = quantize(x, 0, bits, 8, 0.9)
    assert q.zero.abs().max() < 127
    middle = (x.amax(0) + x.amin(0)) / 2
    step = q.scale.float()
    assert ((dequantize(q, 0) - x).abs() <= torch.maximum(x.amax(0) - x.amin(0), step)).all()
    assert (step <= torch.maximum((x.amax(0) - x.amin(0)) / ((1 << bits) - 1), middle.abs() * 0.06) + 1e-3).all()


@given(fmt=formats, seed=seeds, bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_a_nan_stays_in_its_groups(fmt: PageFormat, seed: int, bad: float) -> None:
    _, keys, values = (x.transpose(0, 1) for x in random_qkv(fmt.key_group_size, 2, 2, fmt.head_size, seed=seed))
    token, channel = seed % fmt.key_group_size, seed % fmt.head_size
    worse_keys, worse_values = keys.clone(), values.clone()
    worse_keys[1, token, channel] = worse_values[1, token, channel] = bad

    expected = dequantize(quantize_key_group(keys, fmt), -2)
    actual = dequantize(quantize_key_group(worse_keys, fmt), -2)
    hit = torch.zeros_like(expected, dtype=torch.bool)
    hit[1, :, channel] = True
    assert torch.equal(actual.isnan(), hit)
    assert torch.equal(actual[~hit], expected[~hit])

    expected = dequantize_values(quantize_value_group(values, fmt), fmt)
    actual = dequantize_values(quantize_value_group(worse_values, fmt), fmt)
    hit = torch.zeros_like(expected, dtype=torch.bool)
    first = channel // fmt.value_group_size * fmt.value_group_size
    hit[1, token, first : first + fmt.value_group_size] = True
    assert torch.equal(actual.isnan(), hit)
    assert torch.equal(actual[~hit], expected[~hit])


@given(bits=bits, scale_bits=scale_bits, seed=seeds)
def test_permutation_covariance(bits: int, scale_bits: int, seed: int) -> None:
    """The order within a group, and of the groups, is nothing to the quantizer."""
    x = gaussian(seed, 64, 16)
    g = torch.Generator().manual_seed(seed)
    within, across = torch.randperm(64, generator=g), torch.randperm(16, generator=g)
    plain = quantize(x, 0, bits, scale_bits, 0.9)
    permuted = quantize(x[within][:, across], 0, bits, scale_bits, 0.9)
    assert torch.equal(permuted.codes, plain.codes[within][:, across])
    assert torch.equal(permuted.scale.float(), plain.scale.float()[across])
    assert torch.equal(permuted.zero, plain.zero[across])


@pytest.mark.parametrize(("head_size", "group"), [(80, 64), (96, 64), (80, 32), (96, 128), (64, 128)])
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_ragged_value_groups(head_size: int, group: int, scale_bits: int) -> None:
    """A last group that is shorter is quantized by itself, over its own channels."""
    fmt = PageFormat(head_size, value_group_size=group, scale_bits=scale_bits)
    values = gaussian(0, 3, fmt.key_group_size, head_size)
    values[..., head_size // group * group :] *= 30
    q = quantize_value_group(values, fmt)
    assert q.scale.shape == (3, fmt.value_groups, fmt.key_group_size)
    read = dequantize_values(q, fmt)
    for first in range(0, head_size, group):
        part = slice(first, min(first + group, head_size))
        alone = dequantize(
            quantize(values[..., part], -1, fmt.value_bits, scale_bits, *astuple(fmt.value_rounding)), -1
        )
        assert torch.equal(read[..., part], alone)


@given(fmt=formats, seed=seeds)
def test_groups_are_quantized_alike(fmt: PageFormat, seed: int) -> None:
    """Keys per channel over tokens, values per token over channels: batching changes nothing."""
    _, keys, values = (x.transpose(0, 1) for x in random_qkv(fmt.key_group_size, 2, 2, fmt.head_size, seed=seed))
    both, one = quantize_key_group(keys, fmt), quantize_key_group(keys[1], fmt)
    assert torch.equal(both.codes[1], one.codes)
    assert both.scale.shape == (2, fmt.head_size)
    both, one = quantize_value_group(values, fmt), quantize_value_group(values[1], fmt)
    assert torch.equal(both.codes[1], one.codes)
    assert torch.equal(both.zero[1], one.zero)
