"""Compiles Triton kernels for GPUs that are not there and counts what the compiler made of them.

`python tests/sass.py` prints a table of the launches in `kernel_launches` for the targets that the tests compile;
`--target sm_90` all launches for one target, `--json --part 0/2` one half of the former as JSON. It must run in a
process of its own: the tests' processes set `TRITON_INTERPRET`, with which nothing is compiled.

The launchers themselves are called, with tensors on PyTorch's meta device. Triton's active driver is replaced by one
that names the wanted target, and every launch by its compilation, so what is measured is what a launch would run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

warnings.filterwarnings("ignore", message=".*TRITON_DEFAULT_FP_FUSION.*")

import torch  # noqa: E402
import triton  # noqa: E402
from kernel_launches import CASES, Case  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")


@dataclass(frozen=True)
class Loop:
    """One innermost loop that loads planes and multiplies: that of `planes` planes. Counts are per weight it reads.

    `local` is the number of instructions that access spilled registers.
    """

    planes: int
    instructions: float
    shared_stores: float
    tensor_core: float
    local: int


@dataclass(frozen=True)
class Measurement:
    """What a compiler made of one kernel; `spills` are bytes of stack, or spilled registers on gfx942."""

    kernel: str
    target: str
    dtype: str
    registers: int
    spills: int
    shared_bytes: int
    loops: tuple[Loop, ...]


class _NamedDriver:
    """Stands for a GPU that is not there. Triton caches kernels by the number of the device."""

    def __init__(self, name: str) -> None:
        self.target = TARGETS[name]
        self.device = list(TARGETS).index(name)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(target: str, launch: Callable[[], object]) -> list[Any]:
    """Calls `launch` and returns the compiled kernel of each Triton launch in it."""
    compiled = []
    run, hip = triton.JITFunction.run, torch.version.hip

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    driver.set_active(_NamedDriver(target))
    torch.version.hip = "" if TARGETS[target].backend == "hip" else None
    triton.JITFunction.run = compile_only
    try:
        launch()
    finally:
        triton.JITFunction.run, torch.version.hip = run, hip
    return compiled


def disassemble(cubin: bytes) -> tuple[list[tuple[int, str, str]], int, int]:
    """Address, opcode and operands of each instruction; registers; bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-sass", "-res-usage", file.name], capture_output=True, text=True, check=True)
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", re.MULTILINE)
    code = [(int(address, 16), opcode, operands) for address, opcode, operands in pattern.findall(text.stdout)]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout + text.stderr)
    assert usage is not None
    assert code
    return code, int(usage[1]), int(usage[2])


def innermost_loops(code: Sequence[tuple[int, str, str]]) -> Iterator[Counter[str]]:
    """The opcodes of each loop that holds no other one."""
    places = {address: i for i, (address, _, _) in enumerate(code)}
    spans = set()
    for i, (address, opcode, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            spans.add((places[int(target[1], 16)], i))
    for first, last in sorted(spans):
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in spans):
            yield Counter(opcode.split(".")[0] for _, opcode, _ in code[first : last + 1])


def measure(case: Case, target: str, dtype: str) -> Measurement:
    """Compiles one case. Its loops are told apart by their asynchronous loads, more of them for more planes."""
    kernels = compile_launches(target, lambda: case.launch(getattr(torch, dtype), case.tile))
    compiled = next(kernel for kernel in kernels if kernel.name == case.kernel)
    shared = compiled.metadata.shared
    if TARGETS[target].backend == "hip":
        found = [re.search(rf"\.{key}:\s+(\d+)", compiled.asm["amdgcn"]) for key in ("vgpr_count", "vgpr_spill_count")]
        registers, spills = (int(match[1]) for match in found if match)
        return Measurement(case.name, target, dtype, registers, spills, shared, ())
    code, registers, spills = disassemble(compiled.asm["cubin"])
    share = 32 * case.tile.num_warps / case.weights
    main = [counts for counts in innermost_loops(code) if counts["LDGSTS"] and any(counts[op] for op in _TENSOR_CORE)]
    loops = tuple(
        Loop(
            planes=planes,
            instructions=counts.total() * share,
            shared_stores=counts["STS"] * share,
            tensor_core=sum(counts[op] for op in _TENSOR_CORE) * share,
            local=counts["LDL"] + counts["STL"],
        )
        for planes, counts in enumerate(sorted(main, key=lambda counts: counts["LDGSTS"]), start=1)
    )
    return Measurement(case.name, target, dtype, registers, spills, shared, loops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, help="compile all launches for it, in both dtypes")
    parser.add_argument("--part", default="0/1", help="`i/n`: every n-th build from the i-th")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.target:
        builds = [(case, arguments.target, dtype) for case in CASES for dtype in ("float16", "bfloat16")]
    else:
        builds = [(case, *build) for case in CASES for build in case.builds]
    part, parts = map(int, arguments.part.split("/"))
    measurements = (measure(*build) for build in builds[part::parts])
    if arguments.json:
        print(json.dumps([asdict(measurement) for measurement in measurements]))
        return
    print("| kernel | target | dtype | registers | spills | shared B | planes | SASS/weight | STS/weight |")
    print("|---|---|---|---|---|---|---|---|---|")
    for m in measurements:
        head = f"| {m.kernel} | {m.target} | {m.dtype} | {m.registers} | {m.spills} | {m.shared_bytes} |"
        for loop in m.loops:
            print(f"{head} {loop.planes} | {loop.instructions:.2f} | {loop.shared_stores:.3f} |", flush=True)
        if not m.loops:
            print(f"{head} | | |", flush=True)


if __name__ == "__main__":
    main()
