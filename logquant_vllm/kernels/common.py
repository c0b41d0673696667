"""Device helpers shared by the kernels: where things lie, which tokens have copies, codes and scales.

``FMT`` is the :class:`PageFormat` and ``LAYOUT`` the :class:`CacheLayout` themselves, passed as constants: no byte
offset and no constant of the algorithm is written down a second time. The log selection follows ``core.log_selection``
line by line.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from logquant_vllm.core import log_selection, page_format, quantizer
from logquant_vllm.core.paged import PagedCache

LN2 = tl.constexpr(0.6931471805599453)
HEADER_SLOTS = tl.constexpr(page_format.HEADER_SLOTS)
MAX_SHIFT = tl.constexpr(log_selection._MAX_SHIFT)
E4M3_NAN = tl.constexpr(0x7F)
E4M3_MAX = tl.constexpr(quantizer.E4M3_MAX)
E4M3_TINY = tl.constexpr(quantizer.E4M3_TINY)
# adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer, ties to even
ROUNDING = tl.constexpr(12582912.0)

# What differs from step to step must not compile a kernel anew: counts, whatever their divisors, and metadata of a part
# of the batch, wherever it begins.
STEP_COUNTS = ["num_reqs", "num_tokens", "num_splits", "table_stride"]
STEP_COUNTS += ["window_table_stride", "window_table_width"]
STEP_METADATA = ["query_start_loc", "seq_lens", "block_table", "window_table"]

_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


# -- launching --------------------------------------------------------------------------------------------------------
def check_tokens(key: Tensor, value: Tensor, cache: PagedCache) -> None:
    """What every kernel asks of its tensors.

    Raises:
        TypeError: for other dtypes.
        ValueError: for a strided last dimension.
    """
    if key.dtype not in _TRITON_DTYPES:
        raise TypeError(f"key and value must be float16, bfloat16 or float32, got {key.dtype}")
    if value.dtype != key.dtype:
        raise TypeError(f"key and value must have one dtype, got {key.dtype} and {value.dtype}")
    for name, tensor in (("key", key), ("value", value), ("pages", cache.pages), ("window", cache.window)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous, got stride {tensor.stride(-1)}")


def next_power_of_2(n: int) -> int:
    """The least power of two from ``n >= 1`` on. Triton's own serves kernels too, and takes 5 us on the host."""
    return 1 << (n - 1).bit_length()


def padded(n: int, least: int = 16) -> int:
    """The power of two, at least ``least``, that ``n`` is padded to."""
    return max(next_power_of_2(n), least)


def copy_operand(dtype: torch.dtype) -> tl.dtype:
    """Operand type of products with full-precision tokens: the model's, but Triton's interpreter multiplies bfloat16 as
    integers."""
    interpreted = triton.knobs.runtime.interpret
    return tl.float32 if interpreted and dtype == torch.bfloat16 else _TRITON_DTYPES[dtype]


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability; (0, 0) without a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def launches_ahead(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before still runs, and wait for it by itself (from Hopper on)."""
    return capability(device) >= (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many there are; 1 without a GPU, where the interpreter runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def num_chunks(num_tokens: int, num_reqs: int, size: int) -> int:
    """Programs that cover chunks of ``size`` tokens of every request (:func:`find_request`)."""
    return num_tokens // size + num_reqs


# -- requests ---------------------------------------------------------------------------------------------------------
@triton.jit
def find_request(query_start_loc, index, num_reqs, BLOCK: tl.constexpr):
    """The request that owns chunk ``index`` when request ``r`` owns chunks from ``query_start_loc[r] // BLOCK + r`` on.

    Every request so has at least ``ceil(query_len / BLOCK)`` chunks, and all of them together at most
    ``num_tokens // BLOCK + num_reqs``: a grid that the host knows without reading any length.

    Returns:
        The request and the chunk's index within it.
    """
    low, high = index * 0, index * 0 + num_reqs  # tensors from the start, for the interpreter too
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(query_start_loc + middle) // BLOCK + middle
        if first <= index:
            low = middle
        else:
            high = middle
    return low, index - (tl.load(query_start_loc + low) // BLOCK + low)


@triton.jit
def read_lengths(query_start_loc, seq_lens, request):
    """The first three of :func:`read_request`."""
    start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - start
    return start, query_len, tl.load(seq_lens + request) - query_len


@triton.jit
def load_header(window_bytes, window_byte_stride, block):
    """What a request's first window block begins with; of a row of padding, 0."""
    address = (window_bytes + block.to(tl.int64) * window_byte_stride).to(tl.pointer_type(tl.int32))
    return tl.load(address, mask=block > 0, other=0)


@triton.jit
def first_copied(header, computed):
    """The first position with a full-precision copy (see ``core.paged.read_window_start``)."""
    return tl.where(header > 0, header - 1, computed)


@triton.jit
def read_request(query_start_loc, seq_lens, window_bytes, window_byte_stride, window_table, request, table_stride):
    """What a request brings into the step.

    Returns:
        start: row of its first new token.
        query_len: number of new tokens.
        computed: tokens computed before this step.
        window_start: :func:`first_copied`.
        live: whether it has a window at all; a row of padding has the null block.
    """
    start, query_len, computed = read_lengths(query_start_loc, seq_lens, request)
    block = tl.load(window_table + request.to(tl.int64) * table_stride)
    header = load_header(window_bytes, window_byte_stride, block)
    return start, query_len, computed, first_copied(header, computed), block > 0


# -- the window -------------------------------------------------------------------------------------------------------
@triton.jit
def count_compactions(length, WINDOW: tl.constexpr):
    """``core.log_selection.num_compactions`` of a length on the device."""
    return tl.maximum(length // WINDOW - 2, 0)


@triton.jit
def log_slot_position(slot, compactions, WINDOW: tl.constexpr):
    """``core.log_selection.log_slot_position``: position held by a log-selected slot."""
    steps = slot * 0  # and not zeros_like: Gluon calls this function too
    for _ in tl.static_range(WINDOW.bit_length()):
        steps += ((slot << steps) < WINDOW).to(tl.int32)
    shift = tl.minimum(tl.minimum(steps, compactions), MAX_SHIFT)
    from_chunk = (slot > 0) & (steps <= compactions)
    return tl.where(from_chunk, (compactions - steps) * WINDOW + (slot << shift), slot << shift)


@triton.jit
def is_log_selected(position, compactions, WINDOW: tl.constexpr):
    """``core.log_selection.is_log_selected`` for positions ``>= 0``."""
    chunk = position // WINDOW
    index = tl.where(chunk == 0, position, position - (chunk - 1) * WINDOW)
    halvings = tl.where(chunk == 0, compactions, compactions - chunk + 1)
    mask = (1 << tl.minimum(tl.maximum(halvings, 0), MAX_SHIFT)) - 1
    return (chunk <= compactions) & ((index & mask) == 0)


@triton.jit
def log_slot_of_position(position, compactions, WINDOW: tl.constexpr):
    """Slot of a log-selected position: the inverse of :func:`log_slot_position`."""
    chunk = position // WINDOW
    index = tl.where(chunk == 0, position, position - (chunk - 1) * WINDOW)
    halvings = tl.where(chunk == 0, compactions, compactions - chunk + 1)
    return index >> tl.minimum(tl.maximum(halvings, 0), MAX_SHIFT)


@triton.jit
def slot_of_position(position, compactions, WINDOW: tl.constexpr):
    """``core.paged.slot_of_position``."""
    # the sum keeps the dividend positive: the remainder of a negative one differs between languages
    ring = WINDOW + (position + WINDOW) % (2 * WINDOW)
    return tl.where((position < WINDOW) & (compactions == 0), position, ring)


@triton.jit
def slot_position(slot, computed, WINDOW: tl.constexpr):
    """Position that slot ``slot`` of a request holds after ``computed`` tokens (``core.paged.slot_positions``).

    It holds a token only if the result is below ``computed``. The slot whose result *equals* ``computed`` is where the
    next token will go; there is exactly one as long as ``computed >= 0``.
    """
    compactions = count_compactions(computed, WINDOW)
    recent = (compactions + 1) * WINDOW
    ring = recent + (slot + 2 * WINDOW - recent % (2 * WINDOW)) % (2 * WINDOW)
    return tl.where(slot < WINDOW, log_slot_position(tl.minimum(slot, WINDOW - 1), compactions, WINDOW), ring)


@triton.jit
def find_hole(computed, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The tiles of slots that attention needs none of after ``computed`` tokens, from the first to below the second:
    those behind the next token's, up to the oldest token of the ring. Tiles begin at multiples of ``TILE``."""
    compactions = count_compactions(computed, WINDOW)
    # tokens of the ring; if negative, what is lacking until it begins
    recent = computed - (compactions + 1) * WINDOW
    wrapped = compactions % 2 == 1  # its oldest token is in the second half
    begin = tl.where(wrapped, recent, recent + WINDOW) + 1
    return (begin + TILE - 1) // TILE * TILE, tl.where(wrapped, 2 * WINDOW, 3 * WINDOW + TILE) // TILE * TILE


@triton.jit
def skip_hole(slot, hole):
    """The next slot, from ``slot`` on, outside the tiles of :func:`find_hole`."""
    begin, end = hole
    return tl.where((slot >= begin) & (slot < end), end, slot)


@triton.jit
def slot_offset(slot, table_row, table_width, block_stride, slot_stride, SLOTS_PER_BLOCK: tl.constexpr):
    """Offset of a window slot in elements of the model's dtype (int64, shape of ``slot``)."""
    index = slot + HEADER_SLOTS
    block = tl.load(table_row + tl.minimum(index // SLOTS_PER_BLOCK, table_width - 1))
    place = index % SLOTS_PER_BLOCK
    return block.to(tl.int64) * block_stride + place.to(tl.int64) * slot_stride


@triton.jit
def pages_end(computed, window_start, WINDOW: tl.constexpr):
    """Positions below this are read from pages, but for those with a copy (``core.operations.attention``)."""
    recent = (count_compactions(computed, WINDOW) + 1) * WINDOW
    return tl.minimum(tl.maximum(recent, window_start), computed)


@triton.jit
def read_from_page(position, end, computed, window_start, WINDOW: tl.constexpr):
    """Whether a cached position is attended to in its 2-bit form."""
    copied = is_log_selected(position, count_compactions(computed, WINDOW), WINDOW) & (position >= window_start)
    return (position < end) & ~copied


# -- rounding and 8-bit scales ----------------------------------------------------------------------------------------
@triton.jit
def round_half_even(x):
    """Nearest integer of a float32 below 2**22 in magnitude, ties to even."""
    return (x + ROUNDING) - ROUNDING


@triton.jit
def encode_e4m3(x):
    """e4m3 bits (int32) of float32 ``x`` with ``E4M3_TINY <= x <= E4M3_MAX``, rounded to nearest even.

    In integers, so that the interpreter, every GPU and torch agree on each byte.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # below 2**-6 the step is 2**-9; eight steps are the smallest normal number, whose bits are 8
    subnormal = round_half_even(x * 512.0).to(tl.int32)
    return tl.where(x < 0.015625, subnormal, normal)


@triton.jit
def decode_e4m3(bits):
    """float32 value of non-negative e4m3 ``bits`` (any integer type), NaN included."""
    wide = (bits.to(tl.uint16) << 7).to(tl.float16, bitcast=True)  # the same exponent field, biased by 8 more
    return tl.where(bits == E4M3_NAN, float("nan"), wide.to(tl.float32) * 256.0)


@triton.jit
def load_scale_zero(slab, scale_offset, zero_offset, index, mask, FMT: tl.constexpr):
    """float32 scales and zeros at ``index`` of one of a slab's metadata arrays; 0 where masked."""
    if FMT.scale_bits == 8:
        scale = decode_e4m3(tl.load(slab + scale_offset + index, mask=mask, other=0))
        quarters = tl.load((slab + zero_offset).to(tl.pointer_type(tl.int8)) + index, mask=mask, other=0)
        zero = scale * (quarters.to(tl.float32) * 0.25)
    else:
        half = tl.pointer_type(tl.float16)
        scale = tl.load((slab + scale_offset).to(half) + index, mask=mask, other=0).to(tl.float32)
        zero = tl.load((slab + zero_offset).to(half) + index, mask=mask, other=0).to(tl.float32)
    return scale, zero
