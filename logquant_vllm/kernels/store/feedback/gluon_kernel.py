"""Quantizing keys with error feedback on Hopper and Blackwell, its registers laid out in Gluon.

A kernel of its own for the keys of all groups that a step completes, in place of
``store.quantize.quantize_keys_with_feedback``. It reads nothing that storing writes, so both can run at a time. A
program takes a group of tokens of one KV head, a warp 16 tokens. Channels go block by block, in two rounds:

1. What other blocks have lost reaches the tokens of a block in products with parts of the feedback matrix. Both
   operands are cut into two bfloat16 each; what their three products leave out is below 2**-14 of a share.
2. One lane holds a token's channels of the block (``BY_TOKEN``), so nothing passes between lanes while channels follow
   one another.

The feedback of a head and all keys of a group lie in shared memory. What a block's keys have lost takes their place, so
in the second round they are what their codes stand for and what these lost.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_wait

from logquant_vllm.kernels.cache import find_task, load_lengths, num_reqs, read_lengths
from logquant_vllm.kernels.codes import bits_of_plane
from logquant_vllm.kernels.decode.gluon.layouts import left, plain, products, right
from logquant_vllm.kernels.decode.gluon.sizes import up_to
from logquant_vllm.kernels.decode.gluon.tiles import distance
from logquant_vllm.kernels.store.feedback.codes import channels_again, choose_code, pick
from logquant_vllm.kernels.store.group import copied_keys, copy_offset, open_group
from logquant_vllm.kernels.store.quantize import is_finite, key_code_words, read_scale, scale_and_zero, store_key_scales

BLOCK = gl.constexpr(16)  # channels
SCATTER = gl.constexpr(5003)  # a prime that is no divisor of a number of programs
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.8's name, and 3.6's


@gluon.constexpr_function
def by_token(warps):
    """``[16 * warps, 16]`` with a row to a lane; the upper lanes hold what the lower do."""
    warp_bases = [[16 * w, 0] for w in (1, 2, 4, 8) if w < warps]
    lane_bases = [[1, 0], [2, 0], [4, 0], [8, 0], [0, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], [0, 8]], lane_bases, warp_bases, [], [16 * warps, 16])


@gluon.jit
def count_groups(batch, index, GROUP: gl.constexpr):
    """How many groups a step completes of the requests ``index``; 0 from ``num_reqs`` on."""
    query_len, seq_len = load_lengths(batch, index)
    return gl.where(query_len > 0, seq_len // GROUP - (seq_len - query_len) // GROUP, 0)


@gluon.jit
def copy_keys(memory, group, key, cache, LAYOUT: gl.constexpr):
    """Start to copy the keys of a group (``group.load_tokens``) to ``[blocks, tokens, 16]``."""
    BLOCKS: gl.constexpr = memory.shape[0]
    TOKENS: gl.constexpr = memory.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    position = group.index * TOKENS + gl.arange(0, TOKENS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    copies = copied_keys(cache, group, LAYOUT)
    # new keys as offsets from the copies, which they need not be near to
    new = distance(key.data + group.head * key.head_stride, copies)
    new += (group.start + position - group.computed).to(gl.int64) * key.stride
    offset = gl.where(position >= group.computed, new, copy_offset(group, position, cache, LAYOUT))
    offset = gl.multiple_of(gl.convert_layout(offset, gl.SliceLayout(1, COPY)), 8)
    channel = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, COPY))
    for b in gl.static_range(BLOCKS):
        async_copy.async_copy_global_to_shared(
            memory.index(b), copies + offset[:, None] + (b * BLOCK + channel)[None, :]
        )


@gluon.jit
def copy_feedback(memory, feedback, CHANNELS: gl.constexpr):
    """Start to copy the matrix of a head to ``[blocks * blocks, 16, 16]``.

    Tile ``blocks * k + c`` holds the rows of block ``c`` and the columns of block ``k``.

    Args:
        feedback: pointer to float32 ``[channels, channels]``.
    """
    BLOCKS: gl.constexpr = CHANNELS // BLOCK
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, COPY))[:, None]
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, COPY))[None, :]
    columns = memory._reinterpret(gl.float32, [BLOCKS, CHANNELS, BLOCK], plain(2))
    for b in gl.static_range(BLOCKS):
        async_copy.async_copy_global_to_shared(columns.index(b), feedback + (row * CHANNELS + b * BLOCK + column))


@gluon.jit
def smaller(a, b):
    return gl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def larger(a, b):
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def ranges(keys):
    """Least and largest key of the channels of ``[blocks, tokens, 16]`` in shared memory, both ``[channels]``; NaN
    where a key is."""
    TOKENS: gl.constexpr = keys.shape[1]
    SCAN: gl.constexpr = gl.BlockedLayout([1, TOKENS // 2, 2], [2, 2, 8], [gl.num_warps(), 1, 1], [2, 1, 0])
    x = keys._reinterpret(keys.dtype, keys.shape, plain(3)).load(SCAN).to(gl.float32)
    channels: gl.constexpr = (keys.shape[0] * keys.shape[2],)
    return gl.reshape(gl.reduce(x, 1, smaller), channels), gl.reshape(gl.reduce(x, 1, larger), channels)


@gluon.jit
def cut(x):
    """float32 as a sum of two bfloat16, but for what is below 2**-15 of it."""
    high = (x.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)  # the upper half is a bfloat16
    return high.to(gl.bfloat16), (x - high).to(gl.bfloat16)


@gluon.jit
def choose_block(x, taken_up, of_channels, within, BITS: gl.constexpr, STRETCH: gl.constexpr):
    """Codes (float32) of a block of channels, and what they lose, by token.

    Args:
        x, taken_up: float32 ``[tokens, 16]`` by token.
        of_channels: their scales, zeros, inverse scales and weights, ``[16]`` each.
        within: shared memory ``[16, 16]``: what later channels take up of each.
    """
    LAYOUT: gl.constexpr = x.type.layout
    BY_CHANNEL: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    index = gl.arange(0, BLOCK, layout=BY_CHANNEL)
    codes, lost = gl.zeros_like(x), gl.zeros_like(x)
    for k in gl.static_range(BLOCK):
        one = index == k
        mine = one[None, :]
        scale, zero = pick(of_channels[0], one, 0), pick(of_channels[1], one, 0)
        inverse, weight = pick(of_channels[2], one, 0), pick(of_channels[3], one, 0)
        taken = pick(taken_up, mine, 1) * weight
        code, left = choose_code(pick(x, mine, 1), taken, scale, zero, inverse, BITS, STRETCH)
        codes, lost = gl.where(mine, code[:, None], codes), gl.where(mine, left[:, None], lost)
        if k + 1 < BLOCK:
            share = within.index(k).load(BY_CHANNEL)
            taken_up = gl.where((index > k)[None, :], tl.fma(left[:, None], share[None, :], taken_up), taken_up)
    return codes, lost


@gluon.jit
def store_words(group, codes, FMT: gl.constexpr):
    """Pack codes, shared memory int8 ``[blocks, tokens, 16]``, and store the words of the group's tokens."""
    BLOCKS: gl.constexpr = codes.shape[0]
    TOKENS: gl.constexpr = codes.shape[1]
    PACK: gl.constexpr = gl.BlockedLayout([1, BLOCKS, 4], [8, 1, 4], [gl.num_warps(), 1, 1], [2, 1, 0])
    wide = codes._reinterpret(gl.int8, codes.shape, plain(3)).permute((1, 0, 2)).load(PACK).to(gl.int32)
    for p in gl.static_range(len(FMT.key_planes)):
        store_plane(group, gl.reshape(wide, (TOKENS, FMT.head_size)), FMT, p)


@gluon.jit
def store_plane(group, codes, FMT: gl.constexpr, P: gl.constexpr):
    """Pack a plane's bits of codes ``[tokens, channels]``, and store the words."""
    PLANE: gl.constexpr = FMT.key_planes[P]
    by_slot = gl.reshape(bits_of_plane(codes, PLANE), (codes.shape[0], PLANE.slots, PLANE.words))
    slot = gl.arange(0, PLANE.slots, layout=gl.SliceLayout(0, gl.SliceLayout(2, by_slot.type.layout)))
    words = gl.sum(by_slot << (slot * PLANE.bits)[None, :, None], 1)
    token = gl.arange(0, codes.shape[0], layout=gl.SliceLayout(1, words.type.layout))
    word = gl.arange(0, PLANE.words, layout=gl.SliceLayout(0, words.type.layout))
    gl.store(key_code_words(group, token[:, None], PLANE, FMT) + word[None, :], words.to(gl.uint16))


@gluon.jit
def choose_scales(memory, keys, group, feedback, FMT: gl.constexpr):
    """Scales and zeros of a group's keys, to its page, and to ``memory``, float32 ``[4, channels]``, with the inverse
    scales and the second round's weights behind."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    least, largest = ranges(keys)
    least, largest = gl.convert_layout(least, LANES), gl.convert_layout(largest, LANES)
    finite = is_finite(least) & is_finite(largest)
    ROUNDING: gl.constexpr = FMT.key_rounding
    stored_scale, stored_zero, inverse, zero = scale_and_zero(least, largest, finite, FMT.key_bits, ROUNDING, FMT)
    scale = read_scale(stored_scale, FMT)
    memory.index(0).store(scale)
    memory.index(1).store(zero)
    memory.index(2).store(inverse)
    channel = gl.arange(0, FMT.head_size, layout=LANES)
    memory.index(3).store(gl.load(feedback + channel * (FMT.head_size + 1)))
    store_key_scales(group, channel, stored_scale, stored_zero, channel >= 0, FMT)


@gluon.jit
def add_product(sums, lost, share):
    """Add ``lost @ share`` to three sums of parts of it, which are apart as products wait for each other.

    Args:
        lost: two bfloat16 ``[tokens, 16]`` (:func:`cut`).
        share: float32 ``[16, 16]``.
    """
    high, low = cut(share)
    return mma_v2(lost[0], high, sums[0]), mma_v2(lost[0], low, sums[1]), mma_v2(lost[1], high, sums[2])


@gluon.jit
def load_share(shares, tile, TRANSPOSED: gl.constexpr):
    """A tile of :func:`copy_feedback`'s as the right operand of a product."""
    share = shares.index(tile)
    if TRANSPOSED:
        share = share.permute((1, 0))
    return share.load(right(gl.num_warps()))


@gluon.jit
def transpose(shares, tile):
    """Transpose a tile in its place, and return it."""
    memory = shares.index(tile)
    memory.store(memory.permute((1, 0)).load(products(gl.num_warps())))
    return memory._reinterpret(gl.float32, [BLOCK, BLOCK], plain(1))


@gluon.jit
def load_lost(lost, block):
    """What a block lost as the left operand of a product, two bfloat16."""
    return lost[0].index(block).load(left(gl.num_warps())), lost[1].index(block).load(left(gl.num_warps()))


@gluon.jit
def add_blocks(sums, first, end, lost, shares, start, step, TRANSPOSED: gl.constexpr):
    """Add what blocks ``[first, end)`` of channels lost to what a block takes up.

    Args:
        lost: shared memory bfloat16 ``[blocks, tokens, 16]``, twice.
        shares: as :func:`copy_feedback` lays them out; block ``i`` has tile ``start + i * step``.
        TRANSPOSED: whether its rows are the channels that take up, not those that lose.
    """
    LAST: gl.constexpr = lost[0].shape[0] - 1
    following = gl.minimum(first, LAST)
    share, high_low = load_share(shares, start + following * step, TRANSPOSED), load_lost(lost, following)
    for other in range(first, end):
        this_share, this = share, high_low
        following = gl.minimum(other + 1, LAST)  # is loaded while this one is multiplied
        share, high_low = load_share(shares, start + following * step, TRANSPOSED), load_lost(lost, following)
        sums = add_product(sums, this, this_share)
    return sums


@gluon.jit
def no_sums(TOKENS: gl.constexpr):
    """For :func:`add_blocks`."""
    zeros = gl.zeros([TOKENS, BLOCK], gl.float32, products(gl.num_warps()))
    return zeros, zeros, zeros


@gluon.jit
def load_metadata(of_blocks, block, BLOCKS: gl.constexpr):
    """Scales, zeros, inverse scales and weights of a block's channels, of :func:`choose_scales`'s by blocks."""
    BY_CHANNEL: gl.constexpr = gl.SliceLayout(0, by_token(gl.num_warps()))
    kinds = up_to(4)
    return [of_blocks.index(kind * BLOCKS + block).load(BY_CHANNEL) for kind in kinds]


@gluon.jit
def choose_codes(codes, keys, lost, shares, of_blocks, FMT: gl.constexpr):
    """The first round: what earlier channels lost is taken up.

    Args:
        codes: shared memory int8 ``[blocks, tokens, 16]``: written.
        keys: likewise, 16-bit.
        lost: likewise, what their codes lose, twice bfloat16 (:func:`cut`): written, the first in place of the keys.
        shares: as :func:`copy_feedback` lays them out; what a block has for itself is transposed.
        of_blocks: float32 ``[4 * blocks, 16]``: scales, zeros, inverse scales, weights.
    """
    BLOCKS: gl.constexpr = keys.shape[0]
    BY_TOKEN: gl.constexpr = by_token(gl.num_warps())
    for block in range(BLOCKS):
        sums = add_blocks(no_sums(keys.shape[1]), 0, block, lost, shares, block, BLOCKS, True)
        taken_up = gl.convert_layout(sums[0] + (sums[1] + sums[2]), BY_TOKEN)
        x = keys.index(block).load(BY_TOKEN).to(gl.float32)
        scales, zeros, inverses, weights = load_metadata(of_blocks, block, BLOCKS)
        of_channels = scales, zeros, inverses, gl.zeros_like(weights) + 1.0
        within = transpose(shares, block * BLOCKS + block)
        chosen, left = choose_block(x, taken_up, of_channels, within, FMT.key_bits, FMT.key_rounding.stretch)
        store_block(codes, lost, block, chosen, left)


@gluon.jit
def choose_again(codes, keys, lost, shares, of_blocks, FMT: gl.constexpr):
    """The second round, of the first half: what all other channels lost is taken up. Arguments as in
    :func:`choose_codes`, which it needs before."""
    BLOCKS: gl.constexpr = keys.shape[0]
    BY_TOKEN: gl.constexpr = by_token(gl.num_warps())
    loser = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, right(gl.num_warps())))[:, None]
    taker = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, right(gl.num_warps())))[None, :]
    for block in range(channels_again(FMT.head_size) // BLOCK):
        own = block * BLOCKS + block
        # of those behind in the block what was lost in the first round; those before come as they are chosen
        behind = gl.where(loser > taker, load_share(shares, own, False), 0.0)
        sums = add_product(no_sums(keys.shape[1]), load_lost(lost, block), behind)
        sums = add_blocks(sums, 0, block, lost, shares, block * BLOCKS, 1, False)
        sums = add_blocks(sums, block + 1, BLOCKS, lost, shares, block, BLOCKS, True)
        taken_up = gl.convert_layout(sums[0] + (sums[1] + sums[2]), BY_TOKEN)
        of_channels = load_metadata(of_blocks, block, BLOCKS)
        left = lost[0].index(block).load(BY_TOKEN).to(gl.float32) + lost[1].index(block).load(BY_TOKEN).to(gl.float32)
        code = codes.index(block).load(BY_TOKEN).to(gl.float32)
        # what is left of keys is a little less exact than keys are
        x = tl.fma(code, of_channels[0][None, :], of_channels[1][None, :]) + left
        x = x.to(keys.dtype).to(gl.float32)
        within = transpose(shares, own)
        chosen, left = choose_block(x, taken_up, of_channels, within, FMT.key_bits, FMT.key_rounding.stretch)
        store_block(codes, lost, block, chosen, left)


@gluon.jit
def store_block(codes, lost, block, chosen, left):
    """To shared memory."""
    high, low = cut(left)
    lost[0].index(block).store(high)
    lost[1].index(block).store(low)
    codes.index(block).store(chosen.to(gl.int8))


@gluon.jit
def feedback_kernel(
    key,  # Rows: 16-bit, rows of whole 16 bytes
    feedback,  # float32 [num_kv_heads, head_size, head_size], contiguous
    cache,
    batch,
    LAYOUT: gl.constexpr,
    REQUESTS: gl.constexpr,  # power of two, at least num_reqs; few of them, as each is compiled
    PDL: gl.constexpr,  # waits at its end for the kernel before, which stores everything else
):
    """Programs share out the groups of all requests and heads."""
    FMT: gl.constexpr = LAYOUT.fmt
    GROUP: gl.constexpr = FMT.key_group_size
    HEAD_SIZE: gl.constexpr = FMT.head_size
    BLOCKS: gl.constexpr = HEAD_SIZE // BLOCK

    index = gl.arange(0, REQUESTS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    counts = count_groups(batch, index, GROUP) * cache.num_kv_heads
    ends = tl.cumsum(counts, 0)
    keys = gl.allocate_shared_memory(key.data.dtype.element_ty, [BLOCKS, GROUP, BLOCK], plain(2))
    lost_low = gl.allocate_shared_memory(gl.bfloat16, [BLOCKS, GROUP, BLOCK], plain(2))
    codes = gl.allocate_shared_memory(gl.int8, [BLOCKS, GROUP, BLOCK], plain(2))
    shares = gl.allocate_shared_memory(gl.float32, [BLOCKS * BLOCKS, BLOCK, BLOCK], plain(2))
    metadata = gl.allocate_shared_memory(gl.float32, [4, HEAD_SIZE], plain(1))
    lost = keys._reinterpret(gl.bfloat16, [BLOCKS, GROUP, BLOCK], plain(2)), lost_low
    of_blocks = metadata._reinterpret(gl.float32, [4 * BLOCKS, BLOCK], plain(1))
    # programs of neighbouring numbers may share a multiprocessor, where two take twice as long: few tasks are scattered
    first = gl.program_id(0) * SCATTER % gl.num_programs(0)
    for task in range(first, gl.sum(counts, 0), gl.num_programs(0)):
        request, of_request = find_task(ends, index, num_reqs(batch), task)
        head = of_request % cache.num_kv_heads
        _, _, computed = read_lengths(batch, request)
        first = computed // GROUP
        group, writable = open_group(cache, batch, request, first + of_request // cache.num_kv_heads, head, LAYOUT)
        if writable:
            copy_keys(keys, group, key, cache, LAYOUT)
            async_copy.commit_group()
            of_head = feedback + head.to(gl.int64) * (HEAD_SIZE * HEAD_SIZE)
            copy_feedback(shares, of_head, HEAD_SIZE)
            async_copy.commit_group()
            async_copy.wait_group(1)
            barrier()
            choose_scales(metadata, keys, group, of_head, FMT)
            async_copy.wait_group(0)
            barrier()
            choose_codes(codes, keys, lost, shares, of_blocks, FMT)
            choose_again(codes, keys, lost, shares, of_blocks, FMT)
            store_words(group, codes, FMT)
            barrier()
    if PDL:
        gdc_wait()  # what waits for this kernel waits for the one before too
