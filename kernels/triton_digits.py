"""Two-bit planes to operands of a matrix multiplication, in registers: shared by the Triton kernels.

A tile of `moe_compiler.kernels.planes` holds the digits of channel `128·t + 16·j + i` in half word `i` at *position*
`j`. So the codes of one position are 16 consecutive channels: unpacked, half word for half word, they already are the
first operand of `tl.dot` with the 16 rows `128·t + 16·j + i` of `x` as the second one, and a sum over channels is
eight dots.

A code becomes a float without a conversion: its bits are put into the mantissa of a power of two (`lop3`: `(word &
mask) | magic`), which reads as `code + bias`. Eight positions need few shifts because a code may sit at several places
of a mantissa; its place decides the bias. `bias_of` tells it, always an exact number of the dtype:

=========  ===================================  ==========================
planes     float16                              bfloat16
=========  ===================================  ==========================
1          4, 16 or 64                          8, 32 or 128
2          16, 64, 256 or 1024                  128
3          64                                   128
4          1024                                 two nibbles, together 2176
=========  ===================================  ==========================

A bfloat16 mantissa has 7 bits, so a code of 8 bits is the sum of two nibbles there, the upper one with its magic's
exponent raised by 4.

Kernels take `ASM=True` on NVIDIA: Triton moves layout conversions over an inline assembly with one result, but not
over 16-bit integer arithmetic, which LLVM would also take apart lane by lane. `ASM=False` is the same in plain form,
for other devices and Triton's interpreter. The magic numbers are as in Marlin (Frantar et al., arXiv 2408.11743).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether Triton's interpreter runs the kernels. It keeps bfloat16 as bits: convert, but calculate in float32."""


def inline_assembly() -> bool:
    """Whether kernels run on an NVIDIA GPU: the value of their argument `ASM`."""
    return not INTERPRETED.value and torch.version.hip is None


@triton.constexpr_function
def _mantissa_bits(dtype: tl.dtype) -> int:
    return 10 if dtype == tl.float16 else 7


@triton.constexpr_function
def _start_bit(position: int, planes: int, dtype: tl.dtype) -> int:
    """The mantissa bit at which the code of a position starts."""
    if planes == 1:
        return ((4, 6, 4, 6, 8, 4, 6, 8) if dtype == tl.float16 else (0, 2, 4, 0, 2, 4, 0, 2))[position]
    if dtype == tl.bfloat16 or planes == 4:
        return 0
    return 4 if planes == 3 else (0, 4, 2, 6)[position // 2]


@triton.constexpr_function
def _both(half_word: int) -> int:
    """A constant for both half words of a register."""
    return half_word * 0x10001


@triton.constexpr_function
def _shift(target: str, source: str, right: int) -> str:
    if right == 0:
        return f"mov.b32 {target}, {source}; "
    return f"shr.b32 {target}, {source}, {right}; " if right > 0 else f"shl.b32 {target}, {source}, {-right}; "


@triton.constexpr_function
def _select(target: str, ones: str, zeros: str, mask: int) -> str:
    """`(ones & mask) | (zeros & ~mask)`."""
    return f"lop3.b32 {target}, {ones}, {zeros}, {_both(mask)}, 0xE4; "


@triton.constexpr_function
def _insert(target: str, source: str, mask: int, rest: str) -> str:
    """`(source & mask) | rest`."""
    return f"lop3.b32 {target}, {source}, {_both(mask)}, {rest}, 0xEA; "


@triton.constexpr_function
def _merge_nibbles(target: str, high: str, low: str, position: int) -> str:
    """Four nibbles of the even or of the odd positions, the one of positions `2s` and `2s + 1` at bit `4s`."""
    if position % 2:
        return _shift("s", low, 2) + _select(target, high, "s", 0xCCCC)
    return _shift("s", high, -2) + _select(target, "s", low, 0xCCCC)


@triton.constexpr_function
def unpacking_assembly(position: int, planes: int, dtype: tl.dtype, exponent: int) -> str:
    """PTX of one position: registers `$1` (most significant plane) up to `$P` with two half words each to `$0`."""
    start, pair = _start_bit(position, planes, dtype), position // 2
    mantissa, unit = _mantissa_bits(dtype), 15 if dtype == tl.float16 else 127
    magic = str(_both((unit + mantissa - start + exponent) << mantissa))
    code = ""
    if planes == 1:
        code += _shift("c", "$1", 2 * position - start) + _insert("$0", "c", 0x3 << start, magic)
    elif planes == 2:
        code += _merge_nibbles("n", "$1", "$2", position)
        code += _shift("c", "n", 4 * pair - start) + _insert("$0", "c", 0xF << start, magic)
    elif planes == 3:
        code += _merge_nibbles("n", "$2", "$3", position)
        code += _shift("c", "n", 4 * pair - start) + _insert("l", "c", 0xF << start, magic)
        code += _shift("d", "$1", 2 * position - start - 4) + _insert("$0", "d", 0x3 << (start + 4), "l")
    else:
        code += _merge_nibbles("n", "$1", "$2", position) + _merge_nibbles("m", "$3", "$4", position)
        if pair % 2:
            code += _shift("t", "m", 4) + _select("b", "n", "t", 0xF0F0)
        else:
            code += _shift("t", "n", -4) + _select("b", "t", "m", 0xF0F0)
        code += _shift("c", "b", 8 * (pair // 2) - start) + _insert("$0", "c", 0xFF << start, magic)
    return "{ .reg .b32 b, c, d, l, m, n, s, t; " + code + "}"


@triton.constexpr_function
def _constraints(planes: int) -> str:
    return "=r" + ",r" * planes


@triton.constexpr_function
def bias_of(position: int, planes: int, dtype: tl.dtype, exponent: int = 0) -> float:
    """The number that `biased_codes` adds to the codes of a position.

    Args:
        position: digit position `j`, 0 to 7.
        planes: 1 to 4.
        dtype: `tl.float16` or `tl.bfloat16`.
        exponent: as in `biased_codes`.
    """
    if planes == 4 and dtype == tl.bfloat16:
        return 17.0 * 2 ** _mantissa_bits(dtype)
    return float(2 ** (_mantissa_bits(dtype) - _start_bit(position, planes, dtype) + exponent))


@triton.constexpr_function
def uniform_bias(planes: int, dtype: tl.dtype) -> float:
    """The bias of all positions, or 0 if they differ."""
    biases = {bias_of(position, planes, dtype) for position in range(8)}
    return biases.pop() if len(biases) == 1 else 0.0


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """`acc + a · b`, also in the interpreter."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def load_planes(pointer: tl.tensor, stride: tl.tensor, mask: tl.tensor, P: tl.constexpr) -> tl.tensor:
    """The half words of `P` planes that lie `stride` apart, a tuple from the most significant one.

    Args:
        pointer: a tensor of pointers to the int16 half words of plane 0, 16 consecutive ones in its last dimension.
        stride: half words from one plane to the next.
        mask: what is in bounds, or `None`; elsewhere the half words are 0.
        P: planes.
    """
    if P == 1:
        return (_load(pointer, mask),)
    elif P == 2:
        return _load(pointer, mask), _load(pointer + stride, mask)
    elif P == 3:
        return _load(pointer, mask), _load(pointer + stride, mask), _load(pointer + 2 * stride, mask)
    else:
        return (
            _load(pointer, mask),
            _load(pointer + stride, mask),
            _load(pointer + 2 * stride, mask),
            _load(pointer + 3 * stride, mask),
        )


@triton.jit
def _load(pointer: tl.tensor, mask: tl.tensor) -> tl.tensor:
    if mask is None:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=mask, other=0)


@triton.jit
def _plain_codes(words: tl.tuple, POSITION: tl.constexpr, P: tl.constexpr) -> tl.tensor:
    code = (words[0] >> (2 * POSITION)) & 3
    for plane in tl.static_range(1, P):
        code = code * 4 + ((words[plane] >> (2 * POSITION)) & 3)
    return code


@triton.jit
def biased_codes(
    words: tl.tuple,
    POSITION: tl.constexpr,
    P: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
    EXPONENT: tl.constexpr = 0,
) -> tl.tensor:
    """`(code + bias) · 2**EXPONENT` of one position, of the shape of a plane's half words, in `DTYPE`.

    Eight bits in bfloat16 do not fit one number: use `dot_codes` or `codes`, which take two.

    Args:
        words: the tuple of `load_planes`.
        POSITION: digit position `j`, 0 to 7.
        P: planes, at most 3 for bfloat16.
        DTYPE: `tl.float16` or `tl.bfloat16`.
        ASM: inline assembly or the plain form, see the module.
        EXPONENT: scales by a power of two.
    """
    if ASM:
        assembly: tl.constexpr = unpacking_assembly(POSITION, P, DTYPE, EXPONENT)
        constraints: tl.constexpr = _constraints(P)
        if P == 1:
            args = [words[0]]
        elif P == 2:
            args = [words[0], words[1]]
        elif P == 3:
            args = [words[0], words[1], words[2]]
        else:
            args = [words[0], words[1], words[2], words[3]]
        return tl.inline_asm_elementwise(
            assembly, constraints, args, dtype=tl.float16 if DTYPE == tl.float16 else tl.bfloat16, is_pure=True, pack=2
        )
    else:
        biased = _plain_codes(words, POSITION, P).to(tl.float32) * (1 << EXPONENT) + bias_of(
            POSITION, P, DTYPE, EXPONENT
        )
        return biased.to(DTYPE)


@triton.jit
def dot_codes(
    words: tl.tuple, x: tl.tensor, acc: tl.tensor, POSITION: tl.constexpr, P: tl.constexpr, ASM: tl.constexpr
) -> tl.tensor:
    """`acc + (codes + bias_of(position)) · x`: one dot, or two for eight bits in bfloat16.

    Args:
        words: the tuple of `load_planes`, of shape `(rows, 16)`.
        x: `(16, columns)` float16 or bfloat16, the channels of this position.
        acc: `(rows, columns)` float32.
        POSITION: digit position `j`, 0 to 7.
        P: planes.
        ASM: inline assembly or the plain form, see the module.
    """
    if P == 4 and x.dtype == tl.bfloat16:
        acc = dot(biased_codes((words[0], words[1]), POSITION, 2, x.dtype, ASM, 4), x, acc)
        return dot(biased_codes((words[2], words[3]), POSITION, 2, x.dtype, ASM), x, acc)
    else:
        return dot(biased_codes(words, POSITION, P, x.dtype, ASM), x, acc)


@triton.jit
def codes(
    words: tl.tuple, POSITION: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
) -> tl.tensor:
    """The codes of one position as exact numbers of `DTYPE`; arguments as in `biased_codes`, `P` up to 4 in both."""
    if not ASM:
        return _plain_codes(words, POSITION, P).to(tl.float32).to(DTYPE)
    elif P == 4 and DTYPE == tl.bfloat16:
        return codes((words[0], words[1]), POSITION, 2, DTYPE, ASM) * tl.full((), 16, DTYPE) + codes(
            (words[2], words[3]), POSITION, 2, DTYPE, ASM
        )
    else:
        bias: tl.constexpr = bias_of(POSITION, P, DTYPE)
        return biased_codes(words, POSITION, P, DTYPE, ASM) - tl.full((), bias, DTYPE)
