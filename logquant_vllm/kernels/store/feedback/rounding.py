"""``core.quantizer.round_with_feedback`` with one launch, on tensors that lie outside of any page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.quantizer import Quantized, dequantized_zero
from logquant_vllm.kernels.arguments import padded
from logquant_vllm.kernels.launcher import launch
from logquant_vllm.kernels.store.feedback.codes import choose_codes, feedback_warps

MAX_TOKENS = 64  # of a program


@triton.jit
def round_kernel(
    codes,  # int32 [planes], and then as x: written
    x,  # [groups, heads, GROUP, HEAD_SIZE], contiguous
    scale,  # float32 [groups, heads, HEAD_SIZE], contiguous
    zero,  # likewise
    feedback,  # float32 [heads, HEAD_SIZE, HEAD_SIZE], contiguous
    heads,
    FMT: tl.constexpr,
    STRETCH: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Some tokens of a group of one head."""
    HEAD_SIZE: tl.constexpr = FMT.head_size
    group = tl.program_id(0).to(tl.int64)
    token, channel = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, HEAD_PAD)
    exists, in_head = token < GROUP, channel < HEAD_SIZE
    rows = (group * GROUP + token) * HEAD_SIZE
    tile = tl.load(x + rows[:, None] + channel[None, :], mask=exists[:, None] & in_head[None, :], other=0.0)
    s = tl.load(scale + group * HEAD_SIZE + channel, mask=in_head, other=1.0)
    z = tl.load(zero + group * HEAD_SIZE + channel, mask=in_head, other=0.0)
    of_head = feedback + group % heads * HEAD_SIZE * HEAD_SIZE
    packed = choose_codes(tile.to(tl.float32), s, z, of_head, FMT, STRETCH)
    for p in tl.static_range(len(FMT.key_planes)):
        plane = codes + tl.num_programs(0).to(tl.int64) * (p * GROUP * HEAD_SIZE) + rows[:, None]
        unpack_plane(plane, packed[p], exists, FMT, p)


@triton.jit
def unpack_plane(codes, packed, exists, FMT: tl.constexpr, P: tl.constexpr):
    """Store a plane's bits of the words ``[tokens, words]`` in their place in codes, at pointers to rows of them."""
    PLANE: tl.constexpr = FMT.key_planes[P]
    SLOTS: tl.constexpr = PLANE.slots
    word = tl.arange(0, packed.shape[1])
    mask = exists[:, None] & (word < PLANE.words)[None, :]
    for slot in tl.static_range(SLOTS):
        bits = (packed >> (slot * PLANE.bits)) & ((1 << PLANE.bits) - 1)
        tl.store(codes + (slot * PLANE.words + word)[None, :], bits << PLANE.shift, mask=mask)


def round_with_feedback(x: Tensor, q: Quantized, bits: int, feedback: Tensor, stretch: float = 1.0) -> Quantized:
    """Other codes for what ``quantize`` made of ``x``; see ``core.quantizer.round_with_feedback``.

    Sums of shares are taken in another order: where a channel lies on the edge between two codes, the codes may differ.
    """
    *_, heads, group, head_size = x.shape
    tokens = min(padded(group), MAX_TOKENS)
    fmt, scale = PageFormat(head_size, key_bits=bits), q.scale.float()
    codes = torch.zeros(len(fmt.key_planes), *x.shape, dtype=torch.int32, device=x.device)
    if x.numel():
        launch(
            round_kernel,
            (x.numel() // (group * head_size), -(-group // tokens)),
            codes,
            x.contiguous(),
            scale.contiguous(),
            dequantized_zero(q.scale, q.zero).contiguous(),
            feedback.contiguous(),
            heads,
            FMT=fmt,
            STRETCH=stretch,
            GROUP=group,
            TOKENS=tokens,
            HEAD_PAD=padded(head_size),
            num_warps=feedback_warps(tokens),
            # products and differences are rounded one by one, as the reference does
            enable_fp_fusion=False,
        )
    return Quantized(codes.sum(0, dtype=torch.int32), q.scale, q.zero)
