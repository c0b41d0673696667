"""The queries of one KV head in the Gluon decode kernel: loaded once, for the window as they are, for pages scaled."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from logquant_vllm.kernels.decode.gluon.tiles import HEADS, RIGHT, code_shift, power_of_two

NUM_HEADS = gl.constexpr(HEADS)


@gluon.jit
def load_queries(row, head_stride, first_head, GQA: gl.constexpr, COLUMNS: gl.constexpr, HEAD_SIZE: gl.constexpr):
    """Query heads from ``first_head`` on of the token at ``row`` as a right operand ``[head_size, 8]``, ``COLUMNS`` for
    each head, 0 from the ``GQA``-th on."""
    head = gl.arange(0, NUM_HEADS, layout=gl.SliceLayout(0, RIGHT))[None, :] // COLUMNS
    channel = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(1, RIGHT))[:, None]
    return gl.load(row + (first_head + head) * head_stride + channel, mask=head < GQA, other=0.0)


@gluon.jit
def store_queries(memory, q, WORDS: gl.constexpr, BITS: gl.constexpr):
    """Store ``q`` as float16, divided by a power of two near its largest element and times the weights of the codes'
    slots.

    Args:
        q: from :func:`load_queries`.
        WORDS, BITS: of the keys that it will be multiplied with, as in ``tiles.code_shift``.

    Returns:
        The exponent that was taken out.
    """
    q = q.to(gl.float32)
    largest = gl.max(gl.max(gl.abs(q), 0), 0)
    exponent = (largest.to(gl.int32, bitcast=True) >> 23) - 127
    exponent = gl.maximum(gl.minimum(exponent, 100), -100)
    channel = gl.arange(0, q.shape[0], layout=gl.SliceLayout(1, RIGHT))
    weight = power_of_two(5 - exponent - code_shift(channel, WORDS, BITS))
    memory.store((q * weight[:, None]).to(gl.float16))
    return exponent
