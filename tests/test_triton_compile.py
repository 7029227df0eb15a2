"""The Triton kernels compile for GPUs that are not there, and the compiler keeps the digits in registers.

The counts are what makes a kernel bound by memory: 5.8e12 weights per second reach an H100 at 4 bits, with five
instructions for each. They hang on a layout conversion that Triton moves before the unpacking; where it does not, each
digit passes through shared memory, which shows as `STS`.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kernel_launches import CASES

PROCESSES = 2
BUILDS = [(case.name, target, dtype) for case in CASES for target, dtype in case.builds]
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # of one program, at most
MOST_INSTRUCTIONS = {1: 1.7, 2: 2.2, 3: 3.3, 4: 3.3}  # per weight, in the loop of so many planes, float16 on sm_90


@pytest.fixture(scope="module")
def measurements(tmp_path_factory) -> dict[tuple[str, str, str], dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))

    def run(part: int) -> list[dict[str, Any]]:
        command = [sys.executable, str(Path(__file__).with_name("sass.py")), "--json", "--part", f"{part}/{PROCESSES}"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    with ThreadPoolExecutor(PROCESSES) as pool:
        found = [measurement for part in pool.map(run, range(PROCESSES)) for measurement in part]
    return {(m["kernel"], m["target"], m["dtype"]): m for m in found}


@pytest.mark.parametrize("build", BUILDS, ids=" ".join)
def test_loops_do_not_spill(measurements, build):
    measurement = measurements[build]
    assert measurement["spills"] <= (0 if build[1] == "gfx942" else 32)
    assert all(loop["local"] == 0 for loop in measurement["loops"])


@pytest.mark.parametrize("build", BUILDS, ids=" ".join)
def test_tiles_fit_in_shared_memory(measurements, build):
    assert measurements[build]["shared_bytes"] <= SHARED_BYTES[build[1]]


@pytest.mark.parametrize("build", [build for build in BUILDS if build[1].startswith("sm_")], ids=" ".join)
def test_digits_stay_in_registers(measurements, build):
    loops = measurements[build]["loops"]
    assert [loop["planes"] for loop in loops] == [1, 2, 3, 4]
    assert all(loop["shared_stores"] < 0.1 for loop in loops)


@pytest.mark.parametrize(
    "build", [build for build in BUILDS if "decode" in build[0] and build[1:] == ("sm_90", "float16")], ids=" ".join
)
def test_decoding_is_bound_by_memory(measurements, build):
    for loop in measurements[build]["loops"]:
        assert loop["instructions"] <= MOST_INSTRUCTIONS[loop["planes"]], loop
