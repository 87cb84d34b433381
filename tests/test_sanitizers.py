"""The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer, outside Python."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def compiles(folder: Path, flags: list[str]) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = subprocess.run([COMPILER, *flags, str(probe), "-o", str(folder / "probe")], capture_output=True)
    return built.returncode == 0 and subprocess.run([str(folder / "probe")], capture_output=True).returncode == 0


def test_the_core_runs_clean_under_address_and_undefined_sanitizers(tmp_path):
    if not COMPILER or not compiles(tmp_path, SANITIZE):
        pytest.skip("no C++ compiler with -fsanitize=address,undefined")
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    special = {"passes_avx2": avx2, "passes_avx512": avx512, "dmd_loops_avx2": avx2, "dmd_loops_avx512": avx512}
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    threads = ["-fopenmp"] if compiles(tmp_path, ["-fopenmp"]) else []
    common = ["-std=c++17", "-O0", "-g1", "-w", *SANITIZE, *threads, *(["-DCODMD_X86"] if x86 else [])]
    drivers = [CSRC / "tests" / f"{name}_driver.cpp" for name in ("algebra", "dmd")]
    sources = [*sorted((CSRC / "cpu").glob("*.cpp")), *drivers]

    def build(source: Path) -> str:
        target = str(tmp_path / f"{source.stem}.o")
        subprocess.run([COMPILER, *common, *special.get(source.stem, []), "-c", str(source), "-o", target], check=True)
        return target

    wanted = [s for s in sources if x86 or s.stem not in special]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, wanted))
    core = [name for name in objects if not name.endswith("_driver.o")]
    for driver_object in set(objects) - set(core):
        driver = driver_object.removesuffix(".o")
        subprocess.run([COMPILER, *SANITIZE, *threads, *core, driver_object, "-o", driver], check=True)
        done = subprocess.run(
            [driver], capture_output=True, text=True, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        )
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        assert "0 failed checks" in done.stdout
