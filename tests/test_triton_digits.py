"""The instructions that unpack planes, run by a small PTX interpreter: what the GPU will do, bit by bit."""

import re

import numpy as np
import pytest
import torch
import triton.language as tl

from moe_compiler.kernels.triton_digits import bias_of, uniform_bias, unpacking_assembly

WORDS = 512
DTYPES = {tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
CASES = [(planes, dtype) for dtype in DTYPES for planes in (1, 2, 3, 4) if (planes, dtype) != (4, tl.bfloat16)]


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    out = np.zeros_like(a)
    for minterm in range(8):
        if table >> minterm & 1:
            out |= (a if minterm & 4 else ~a) & (b if minterm & 2 else ~b) & (c if minterm & 1 else ~c)
    return out


def run_ptx(assembly: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    """Runs `mov`, `shl`, `shr` and `lop3` on vectors of 32-bit registers and returns `$0`."""
    registers = dict(registers)
    for statement in assembly.strip("{} ").split(";"):
        opcode, _, rest = statement.strip().partition(" ")
        if opcode in ("", ".reg"):
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        values = [
            registers[operand] if operand in registers else np.full(WORDS, int(operand, 0), dtype=np.uint32)
            for operand in operands
        ]
        match opcode:
            case "mov.b32":
                registers[target] = values[0]
            case "shl.b32":
                registers[target] = values[0] << values[1]
            case "shr.b32":
                registers[target] = values[0] >> values[1]
            case "lop3.b32":
                registers[target] = lop3(*values[:3], int(operands[3], 0))
            case _:
                raise AssertionError(opcode)
    return registers["$0"]


def random_planes(planes: int) -> list[np.ndarray]:
    return list(np.random.default_rng(planes).integers(0, 1 << 32, (planes, WORDS), dtype=np.uint32))


def codes_of(planes: list[np.ndarray], position: int) -> np.ndarray:
    code = np.zeros(2 * WORDS, dtype=np.int64)
    for plane in planes:
        code = code * 4 + ((plane.view(np.uint16) >> (2 * position)) & 3)
    return code


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize(("planes", "dtype"), CASES)
@pytest.mark.parametrize("exponent", [0, 4])
def test_assembly_gives_code_plus_bias(planes, dtype, position, exponent):
    words = random_planes(planes)
    assembly = unpacking_assembly(position, planes, dtype, exponent)
    out = run_ptx(assembly, {f"${i + 1}": word for i, word in enumerate(words)})
    value = torch.from_numpy(out.view(np.int16).copy()).view(DTYPES[dtype]).double().numpy()
    expected = codes_of(words, position) * 2.0**exponent + bias_of(position, planes, dtype, exponent)
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("position", range(8))
def test_eight_bits_are_two_nibbles_in_bfloat16(position):
    words = random_planes(4)
    value = np.zeros(2 * WORDS)
    for pair, exponent in ((words[:2], 4), (words[2:], 0)):
        out = run_ptx(unpacking_assembly(position, 2, tl.bfloat16, exponent), {"$1": pair[0], "$2": pair[1]})
        value += torch.from_numpy(out.view(np.int16).copy()).view(torch.bfloat16).double().numpy()
    np.testing.assert_array_equal(value, codes_of(words, position) + bias_of(position, 4, tl.bfloat16))


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_are_exact_and_uniform_where_it_says_so(planes, dtype):
    biases = {bias_of(position, planes, dtype) for position in range(8)}
    if (planes, dtype) != (4, tl.bfloat16):
        assert all(float(torch.tensor(bias, dtype=DTYPES[dtype])) == bias for bias in biases)
    assert uniform_bias(planes, dtype) == (biases.pop() if len(biases) == 1 else 0)


def test_assembly_declares_its_registers():
    for planes, dtype in CASES:
        assembly = unpacking_assembly(5, planes, dtype, 0)
        declared = re.search(r"\.reg \.b32 ([^;]*);", assembly)[1].split(", ")
        assert set(re.findall(r"\b[a-z]\b", assembly.split(";", 1)[1])) <= set(declared)
