"""``core.quantizer.round_with_feedback`` with one launch, on tensors that lie outside of any page."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from logquant_vllm.core.quantizer import Quantized, dequantized_zero
from logquant_vllm.kernels.common import padded
from logquant_vllm.kernels.feedback import FEEDBACK_TOKENS, choose_code, take_up


@triton.jit
def round_kernel(
    codes,  # int32, as x: written
    x,  # [groups, heads, GROUP, HEAD_SIZE], contiguous
    scale,  # float32 [groups, heads, HEAD_SIZE], contiguous
    zero,  # likewise
    feedback,  # float32 [heads, HEAD_SIZE, HEAD_SIZE], contiguous
    heads,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Some tokens of a group of one head; channels follow one another as in ``kernels.feedback``."""
    group = tl.program_id(0).to(tl.int64)
    token, channel = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, HEAD_PAD)
    exists = token < GROUP
    rows = (group * GROUP + token) * HEAD_SIZE
    shares = feedback + group % heads * HEAD_SIZE * HEAD_SIZE
    in_head = exists[:, None] & (channel < HEAD_SIZE)[None, :]
    tile = tl.load(x + rows[:, None] + channel[None, :], mask=in_head, other=0.0).to(tl.float32)
    errors = tl.zeros((TOKENS, HEAD_PAD), tl.float32)
    for c in range(HEAD_SIZE):
        share = tl.load(shares + c * HEAD_SIZE + channel, mask=channel < c, other=0.0)
        s, z = tl.load(scale + group * HEAD_SIZE + c), tl.load(zero + group * HEAD_SIZE + c)
        code, error = choose_code(take_up(tile, errors, share, channel, c), s, z, BITS)
        errors = tl.where((channel == c)[None, :], error[:, None], errors)
        tl.store(codes + rows + c, code.to(tl.int32), mask=exists)


def round_with_feedback(x: Tensor, q: Quantized, bits: int, feedback: Tensor) -> Quantized:
    """Other codes for what ``quantize`` made of ``x``; see ``core.quantizer.round_with_feedback``.

    Sums of shares are taken in another order: where a channel lies on the edge between two codes, the codes may differ.
    """
    *_, heads, group, head_size = x.shape
    codes, scale = q.codes.contiguous().clone(), q.scale.float()
    if x.numel():
        round_kernel[(x.numel() // (group * head_size), -(-group // FEEDBACK_TOKENS))](
            codes,
            x.contiguous(),
            scale.contiguous(),
            dequantized_zero(q.scale, q.zero).contiguous(),
            feedback.contiguous(),
            heads,
            BITS=bits,
            GROUP=group,
            TOKENS=FEEDBACK_TOKENS,
            HEAD_SIZE=head_size,
            HEAD_PAD=padded(head_size),
            num_warps=4,
            # products and differences are rounded one by one, as the reference does
            enable_fp_fusion=False,
        )
    return Quantized(codes, q.scale, q.zero)
