"""Device helpers: codes as the pages store them (``core.page_format``), plane by plane."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plane_words(slab, PLANE: tl.constexpr):
    """Pointer to the words of a plane."""
    return (slab + PLANE.offset).to(tl.pointer_type(tl.uint16))


@triton.jit
def bits_of_plane(codes, PLANE: tl.constexpr):
    """A plane's bits of int32 codes."""
    return (codes >> PLANE.shift) & ((1 << PLANE.bits) - 1)


@triton.jit
def load_codes(slab, row, group, index, mask, PLANES: tl.constexpr, GROUPS: tl.constexpr):
    """int32 codes ``index`` of a row, or of a ``group`` of it if a row has several; 0 where masked. The arguments
    broadcast.

    Args:
        PLANES: ``PageFormat.key_planes``, whose rows are tokens and hold channels, or ``value_planes``, whose rows are
            channels and hold ``GROUPS`` groups of tokens.
    """
    codes = load_plane(slab, row, group, index, mask, PLANES, 0, GROUPS)
    for p in tl.static_range(1, len(PLANES)):
        codes += load_plane(slab, row, group, index, mask, PLANES, p, GROUPS)
    return codes


@triton.jit
def load_plane(slab, row, group, index, mask, PLANES: tl.constexpr, P: tl.constexpr, GROUPS: tl.constexpr):
    """One plane's bits of :func:`load_codes`, in their place."""
    PLANE: tl.constexpr = PLANES[P]
    WORDS: tl.constexpr = PLANE.words // GROUPS
    address = plane_words(slab, PLANE) + row * PLANE.words + group * WORDS + index % WORDS
    word = tl.load(address, mask=mask, other=0).to(tl.int32)
    return ((word >> (index // WORDS * PLANE.bits)) & ((1 << PLANE.bits) - 1)) << PLANE.shift
