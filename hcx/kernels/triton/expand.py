"""From words to weights inside a kernel: tables of levels, byte permutation, and where each weight goes in a tile.

`layout` specifies the words. Every function here is inlined into the kernels. The single machine instruction that is
written by hand is `prmt`; in Triton's interpreter, which cannot run it, the same function is spelled out in
arithmetic.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of compile-time arguments; the others have none.

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether the kernels of this process run in the interpreter (TRITON_INTERPRET=1 when this module was imported)."""


@triton.jit
def matrix_product(a, b, total):
    """`total + a b` in fp32. The interpreter multiplies bf16 as if it were integers, so there it is widened first."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


@triton.jit
def _byte(a, b, selector, position: tl.constexpr):
    pair = (b.to(tl.int64) << 32) | (a.to(tl.int64) & 0xFFFFFFFF)
    return ((pair >> (8 * ((selector >> (4 * position)) & 7))) & 0xFF).to(tl.int32)


@triton.jit
def permute_bytes(a, b, selector):
    """Byte `i` of the result is byte `(selector >> 4 i) & 7` of the eight bytes of `a` (0 to 3) and `b` (4 to 7).

    PTX `prmt.b32` in its default mode. Bit 3 of a nibble must be 0; bits above 15 of the selector do not matter.
    """
    if INTERPRETED:
        low = _byte(a, b, selector, 0) | (_byte(a, b, selector, 1) << 8)
        return low | (_byte(a, b, selector, 2) << 16) | (_byte(a, b, selector, 3) << 24)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def narrowed(value, dtype: tl.constexpr):
    """fp32 rounded to the nearest number of a dtype; the interpreter alone would cut bf16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True).to(tl.int64)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        return bits.to(tl.int32).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return value.to(dtype)


@triton.jit
def _pair(low, high, HALF: tl.constexpr):
    """Two fp32 numbers rounded to 16 bits, in one word."""
    NARROW: tl.constexpr = tl.float16 if HALF else tl.bfloat16
    first = narrowed(low, NARROW).to(tl.int16, bitcast=True)
    second = narrowed(high, NARROW).to(tl.int16, bitcast=True)
    return (first.to(tl.int32) & 0xFFFF) | (second.to(tl.int32) << 16)


@triton.jit
def rounding_error(value, dtype: tl.constexpr):
    """What rounding fp32 to a dtype leaves, in fp32."""
    return value - narrowed(value, dtype).to(tl.float32)


@triton.jit
def _scale(scales, line):
    # A group's scales of one plane lie one line of padded rows after those of the plane before.
    return tl.load(scales + line).to(tl.float32)


@triton.jit
def _rounded(level, REST: tl.constexpr, HALF: tl.constexpr):
    if REST:
        return rounding_error(level, tl.float16 if HALF else tl.bfloat16)
    else:
        return level


@triton.jit
def table(scales, base, line, KIND: tl.constexpr, REST: tl.constexpr, HALF: tl.constexpr):
    """The levels of a part for each (row, quarter of a tile), as bytes.

    Args:
        scales: pointers `[rows, 4]` to the scale of the part's first plane.
        base: fp32 `[rows, 4]` added to every level.
        line: elements from one plane's scales to the next one's.
        KIND: planes of the part.
        REST: the table holds what 16-bit rounding of the levels leaves instead of the levels.
        HALF: levels are fp16, else bf16.

    Returns:
        Words with the low bytes of entries 0-3 and 4-7, and with their high bytes.
    """
    first = _scale(scales, 0)
    if KIND == 1:
        zero = _pair(_rounded(base - first, REST, HALF), _rounded(base + first, REST, HALF), HALF)
        one = zero
    elif KIND == 2:
        second = _scale(scales, line)
        zero = _pair(
            _rounded(base + (-first - second), REST, HALF), _rounded(base + (first - second), REST, HALF), HALF
        )
        one = _pair(_rounded(base + (second - first), REST, HALF), _rounded(base + (first + second), REST, HALF), HALF)
    if KIND <= 2:
        low = permute_bytes(zero, one, 0x6420)
        high = permute_bytes(zero, one, 0x7531)
        return low, low, high, high
    else:
        # Three index bits: planes 0-2 around the base, or planes 1-3 around plane 0's scale (kind 4).
        if KIND == 4:
            base = base + first
            a = _scale(scales, line)
            b = _scale(scales, 2 * line)
            c = _scale(scales, 3 * line)
        else:
            a = first
            b = _scale(scales, line)
            c = _scale(scales, 2 * line)
        below = base - c
        above = base + c
        both = a + b
        differing = a - b
        p01 = _pair(_rounded(below - both, REST, HALF), _rounded(below + differing, REST, HALF), HALF)
        p23 = _pair(_rounded(below - differing, REST, HALF), _rounded(below + both, REST, HALF), HALF)
        p45 = _pair(_rounded(above - both, REST, HALF), _rounded(above + differing, REST, HALF), HALF)
        p67 = _pair(_rounded(above - differing, REST, HALF), _rounded(above + both, REST, HALF), HALF)
        low0 = permute_bytes(p01, p23, 0x6420)
        high0 = permute_bytes(p01, p23, 0x7531)
        low1 = permute_bytes(p45, p67, 0x6420)
        high1 = permute_bytes(p45, p67, 0x7531)
        return low0, low1, high0, high1


@triton.jit
def _four(selector, signs, low0, low1, high0, high1, SHIFT: tl.constexpr, SIGNED: tl.constexpr):
    """Four weights as two words of two 16-bit numbers, along a new last dimension."""
    low = permute_bytes(low0, low1, selector)
    high = permute_bytes(high0, high1, selector)
    if SIGNED:
        high = high ^ ((signs << SHIFT) & -2139062144)  # 0x80808080: the sign bit of each high byte
    return tl.join(permute_bytes(low, high, 0x5140), permute_bytes(low, high, 0x7362))


@triton.jit
def _eight(selector, signs, low0, low1, high0, high1, INDEX: tl.constexpr, SIGNED: tl.constexpr):
    first = _four(selector, signs, low0, low1, high0, high1, 2 * INDEX, SIGNED)
    second = _four(selector >> 16, signs, low0, low1, high0, high1, 2 * INDEX + 1, SIGNED)
    return tl.join(first, second)


@triton.jit
def weights(words, plane, low0, low1, high0, high1, KIND: tl.constexpr, HALF: tl.constexpr):
    """A tile's weights of one part.

    Args:
        words: pointers `[rows, 4, words]` to the part's first words.
        plane: elements from one plane's words to the next one's.
        low0, low1, high0, high1: the part's table, each `[rows, 4, 1]`.

    Returns:
        `[rows, 4, words, 2, 2, 2, 2, 2]` in fp16 or bf16. With the last five indices p, h, i0, i1, b it is input
        `16 i1 + 8 i0 + 4 h + 2 p + b` of the word.
    """
    a = tl.load(words)
    signs = a
    if KIND == 1:
        s0 = a & 0x11111111
        s1 = (a >> 1) & 0x11111111
        s2 = (a >> 2) & 0x11111111
        s3 = (a >> 3) & 0x11111111
    elif KIND == 2:
        b = tl.load(words + plane)
        s0 = a & 0x33333333
        s1 = (a >> 2) & 0x33333333
        s2 = b & 0x33333333
        s3 = (b >> 2) & 0x33333333
    else:
        b = tl.load(words + plane)
        c = tl.load(words + 2 * plane)
        if KIND == 4:
            signs = tl.load(words + 3 * plane)
        s0 = a & 0x77777777
        s1 = b & 0x77777777
        s2 = c & 0x77777777
        s3 = ((a >> 3) & 0x11111111) | ((b >> 2) & 0x22222222) | ((c >> 1) & 0x44444444)
    SIGNED: tl.constexpr = KIND == 4
    e0 = _eight(s0, signs, low0, low1, high0, high1, 0, SIGNED)
    e1 = _eight(s1, signs, low0, low1, high0, high1, 1, SIGNED)
    e2 = _eight(s2, signs, low0, low1, high0, high1, 2, SIGNED)
    e3 = _eight(s3, signs, low0, low1, high0, high1, 3, SIGNED)
    pairs = tl.join(tl.join(e0, e1), tl.join(e2, e3))
    first = (pairs & 0xFFFF).to(tl.int16)
    second = (pairs >> 16).to(tl.int16)
    if HALF:
        return tl.join(first.to(tl.float16, bitcast=True), second.to(tl.float16, bitcast=True))
    else:
        return tl.join(first.to(tl.bfloat16, bitcast=True), second.to(tl.bfloat16, bitcast=True))


@triton.jit
def in_dot_order(weight, ROWS: tl.constexpr, WORDS: tl.constexpr, RUN: tl.constexpr):
    """A tile's weights as `[rows, 128 * words]`, each thread's own inputs where the matrix instruction wants them.

    In the fragment of a 16-bit matrix instruction, four neighbouring threads hold `RUN` neighbouring columns each, in
    turn. Giving thread `t` the weights of quarter `t` therefore needs no exchange between threads: only the name of
    each column changes, and the activations are renamed alike (`activations_in_dot_order`).

    Args:
        RUN: 2 on warpgroup instructions (wgmma), 4 on mma.sync as Triton feeds it.
    """
    if RUN == 2:
        ordered = tl.permute(weight, (0, 2, 6, 5, 4, 3, 1, 7))
    else:
        ordered = tl.permute(weight, (0, 2, 6, 5, 4, 1, 3, 7))
    return tl.reshape(ordered, (ROWS, 128 * WORDS))


@triton.jit
def activations_in_dot_order(x, COLUMNS: tl.constexpr, WORDS: tl.constexpr, RUN: tl.constexpr):
    """Activations `[columns, 128 * words]` of a tile in the order of `in_dot_order`."""
    split = tl.reshape(x, (COLUMNS, 4, WORDS, 8, 2, 2))
    if RUN == 2:
        ordered = tl.permute(split, (0, 2, 3, 4, 1, 5))
    else:
        ordered = tl.permute(split, (0, 2, 3, 1, 4, 5))
    return tl.reshape(ordered, (COLUMNS, 128 * WORDS))


@triton.jit
def word_pointers(codes, rows, tile, num_tiles, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Pointers `[rows, 4, words]` to the words of the first plane."""
    line = ((rows // 16) * num_tiles + tile) * (BITS * 64 * WORDS) + (rows % 16) * (4 * WORDS)
    return codes + tl.reshape(line[:, None] + tl.arange(0, 4 * WORDS)[None, :], (ROWS, 4, WORDS))


@triton.jit
def group_of_quarter(tile, num_groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
    """`[4]`: the group of each quarter of a tile; quarters past the end get the last one, and meet zero activations."""
    group = (tile * (128 * WORDS) + tl.arange(0, 4) * (32 * WORDS)) // GROUP
    return tl.minimum(group, num_groups - 1)


@triton.jit
def plane_bits(words, plane, KIND: tl.constexpr, INDEX: tl.constexpr):
    """Bits of plane `INDEX` of a part, `[rows, 4, words, 32]`, by plain shifts: for kernels that are not short of time.

    Args:
        words: pointers `[rows, 4, words, 1]` to the part's first words.
        plane: elements from one plane's words to the next one's.
    """
    position = tl.arange(0, 32)[None, None, None, :]
    selector = position // 8
    nibble = 4 * (position % 8)
    a = tl.load(words)
    if KIND == 1:
        return (a >> (nibble + selector)) & 1
    elif KIND == 2:
        b = tl.load(words + plane)
        return (tl.where(selector < 2, a, b) >> (nibble + 2 * (selector % 2) + INDEX)) & 1
    else:
        if KIND == 4:
            negative = (tl.load(words + 3 * plane) >> (8 * (position % 4) + 7 - position // 4)) & 1
        if KIND == 4 and INDEX == 0:
            return 1 - negative
        else:
            BIT: tl.constexpr = INDEX - (KIND - 3)
            b = tl.load(words + plane)
            c = tl.load(words + 2 * plane)
            whole = tl.where(selector == 0, a, tl.where(selector == 1, b, c))
            last = (tl.load(words + BIT * plane) >> (nibble + 3)) & 1
            bit = tl.where(selector == 3, last, (whole >> (nibble + BIT)) & 1)
            if KIND == 4:
                bit = bit ^ negative
            return bit
