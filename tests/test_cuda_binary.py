"""The CUDA extension as nvcc builds it, without a GPU: every kernel for sm_90, by --every for all by default.

Skipped only where there is no usable nvcc; what the kernels compute is tested in test_cuda_host.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from cuda_toolkit import ROOT

from benchmarks.nvcc import load_nvcc

# GradientPass is compiled without the distribution matching term and with it; kernel_of tells that of a decoupled loss.
PER_DTYPE = {
    "RelationPass": 3, "DmdPass": 3, "DecoupledPass": 3, "GradientPass": 6, "DecoupledGradientPass": 3, "GramPass": 3,
    "MeanPass": 3, "MixPass": 3,
}  # fmt: skip
ONCE = ("FinishPass", "GatheredPass", "DmdFinishPass", "UnitPass", "DivergencePass", "MatrixPass", "TermsPass")
# Registers that leave room for the blocks a multiprocessor should hold: the pooling pass and the write of its gradient
# are bound by memory alone.
BUDGETS = {"RelationPass": 64, "GradientPass": 96, "UnitPass": 64}
LARGEST_BUDGET = 128
CXX = os.environ.get("CXX", "g++")

nvcc = load_nvcc()


@pytest.fixture(scope="module")
def toolkit():
    try:
        return nvcc.find_toolkit()
    except nvcc.Unavailable as error:
        if os.environ.get("CUDA_HOME") or shutil.which("nvcc"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(request, toolkit, tmp_path_factory):
    """(architectures, [(object, messages)]) of the build, ptxas talking; the PTX stays beside the objects."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        wanted = nvcc.DEFAULT_ARCHS if request.config.getoption("--every") else (90,)
        archs = [arch for arch in wanted if arch in toolkit.known]
        folder = str(tmp_path_factory.mktemp("cuda"))
        return archs, nvcc.compile_sources(toolkit, archs, folder, "-Xptxas=-v", "--keep", f"--keep-dir={folder}")
    finally:
        os.chdir(before)


def kernel_of(symbol: str) -> str:
    (name,) = re.findall(r"\d([A-Z][A-Za-z]*Pass)", symbol)
    return f"Decoupled{name}" if "MovedE2E" in symbol else name


def reports(messages: str) -> list[tuple[str, int, int, int]]:
    """(kernel, architecture, bytes spilled, registers) of every compiled entry."""
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        (kernel_of(symbol), int(arch), int(stores) + int(loads), int(registers))
        for symbol, arch, stores, loads, registers in re.findall(pattern, messages, re.DOTALL)
    ]


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture_without_spills(compiled):
    archs, objects = compiled
    found = [report for _, messages in objects for report in reports(messages)]
    expected = Counter({(kernel, arch): count for kernel, count in PER_DTYPE.items() for arch in archs})
    expected.update({(kernel, arch): 1 for kernel in ONCE for arch in archs})
    assert Counter((kernel, arch) for kernel, arch, _, _ in found) == expected
    assert not [report for report in found if report[2]], "spills"
    beyond = [report for report in found if report[3] > BUDGETS.get(report[0], LARGEST_BUDGET)]
    assert not beyond, "registers"


@pytest.fixture(scope="module")
def binding(compiled, tmp_path_factory):
    """Objects of the whole extension, but for the runtime."""
    import pybind11

    archs, objects = compiled
    target = str(tmp_path_factory.mktemp("binding") / "binding.o")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f'-DCODMD_CUDA_TARGETS="{nvcc.target_names(archs)}"']
    subprocess.run([CXX, *flags, *includes, "-c", str(ROOT / nvcc.BINDING), "-o", target], check=True)
    return [target, *(name for name, _ in objects)]


def link(folder: Path, *inputs: str) -> Path:
    target = folder / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([CXX, "-shared", *inputs, "-o", str(target)], check=True)
    return target


@pytest.mark.slow
def test_the_binary_holds_every_kernel_links_no_cuda_library_and_says_why_it_cannot_run(
    toolkit, compiled, binding, tmp_path
):
    libraries = [f"-L{toolkit.library_dir}", *(f"-l{name}" for name in toolkit.libraries)]
    target = link(tmp_path, *binding, *libraries)
    symbols = subprocess.run(["nm", str(target)], capture_output=True, text=True, check=True).stdout
    stubs = Counter(kernel_of(name) for name in set(re.findall(r"_ZN5codmd4cudaL?3runI\S+_$", symbols, re.MULTILINE)))
    assert stubs == Counter({**PER_DTYPE, **dict.fromkeys(ONCE, 1)})
    linked = subprocess.run(["ldd", str(target)], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in linked.replace(str(target), "")
    assert "torch" not in linked
    script = "import _C_cuda as m; print(m.targets); print(m.device_problem(99))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    targets, problem = said.stdout.splitlines()
    assert targets == nvcc.target_names(compiled[0])
    assert re.search(r"\(cudaError\w+\)$", problem)


@pytest.fixture(scope="module")
def recording(binding, tmp_path_factory):
    """(the extension, its runtime): nvcc's objects on csrc/tests/cudart_recorder.cpp."""
    # Symbolic, for a torch built for CUDA has brought its own runtime into the process.
    recorder = "-fPIC", "-Wl,-Bsymbolic", str(ROOT / "csrc/tests/cudart_recorder.cpp")
    target = link(tmp_path_factory.mktemp("recording"), *binding, *recorder)
    spec = importlib.util.spec_from_file_location("_C_cuda", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runtime = ctypes.CDLL(str(target))
    runtime.recorded.restype = ctypes.c_char_p
    return module, runtime


DEVICE, STREAM = 1, 0xABC
# The recorder touches no memory, so that any address will do, with any length.
SHAPE = (2, 7, 4, 9, 16)
LATENT, FLOATS = (4096, 1 << 40, 0, 1, (4032, 576, 144, 16, 1)), (4096, 1 << 40, 0, 0, None)
NUMBERS = (0.1, 1.0, 1.0, 0.1, 3.5, 0.0)
RULE = (0, 1, False, 0, 0.0, 0, 0.0, 0.5, False, False, False)


def memory(size, counters):
    assert size > 0
    return (4096, size, 0, 4, None), (4096, 4 * counters, 0, 5, None)


def place(device=DEVICE):
    return device, 132, STREAM


def call_of(pool, rule=None, latents=3, augment=None):
    """A bfloat16 call's leading arguments."""
    tensors = (*(LATENT,) * latents, *(None,) * (10 - latents), augment, augment)
    return tensors, SHAPE, False, 1, pool, rule, NUMBERS


def forward(module, pool, device=DEVICE, rule=None, latents=3, augment=None):
    found = (FLOATS, *(FLOATS if rule else None,) * 2, FLOATS, FLOATS, None)
    module.forward(place(device), memory, *call_of(pool, rule, latents, augment), found)


def backward(module, pool, rule=None, latents=3, augment=None):
    found = (None, *(FLOATS if rule else None,) * 2, FLOATS, FLOATS, None)
    module.gradient(place(), LATENT, (FLOATS, None, None, None), *call_of(pool, rule, latents, augment), found)


def both_terms(module, pool):
    forward(module, pool, rule=RULE, latents=4)
    backward(module, pool, rule=RULE, latents=4)


def decoupled(module, pool):
    forward(module, pool, rule=RULE, augment=LATENT)
    backward(module, pool, rule=RULE, augment=LATENT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "call, pool, kernels",
    [
        (forward, (1, 1), ["RelationPass", "FinishPass"]),
        (forward, (9, 16), ["RelationPass", *["UnitPass", "GramPass", "DivergencePass", "MatrixPass", "MixPass"],
                            "MeanPass", *["UnitPass", "GramPass", "DivergencePass", "MatrixPass", "MixPass"],
                            "TermsPass"]),
        (backward, (1, 1), ["GradientPass"]),
        (backward, (0, 0), ["MixPass"]),
        (both_terms, (3, 2), ["DmdPass", "DmdFinishPass", "FinishPass", "GradientPass"]),
        (decoupled, (3, 2), ["DmdPass", "DmdFinishPass", "DmdPass", "DmdFinishPass", "DecoupledPass", "DmdFinishPass",
                             "FinishPass", "DecoupledGradientPass"]),
    ],
    ids=["pooled", "many features", "spread", "mix", "both terms", "decoupled"],
)  # fmt: skip
def test_every_kernel_goes_to_the_stream_and_device_asked_for_and_the_callers_device_stays(
    recording, call, pool, kernels
):
    module, runtime = recording
    runtime.forget(0)
    call(module, pool)
    launches = [line.split() for line in runtime.recorded().decode().splitlines()]
    assert [kernel_of(symbol) for symbol, *_ in launches] == kernels
    for _, device, stream, blocks, threads, shared, *_ in launches:
        assert (int(device), int(stream)) == (DEVICE, STREAM)
        assert int(blocks) >= 1
        assert int(threads) == 256
        assert int(shared) <= 48 * 1024, "what every device gives without asking"
    assert runtime.recorded_device() == 0


@pytest.mark.slow
def test_the_latency_model_walks_what_the_host_code_launches(recording, compiled):
    extension = pytest.importorskip("benchmarks.latency.extension")
    from benchmarks.latency.model import model

    made = extension.described(*recording, [Path(name) for name, _ in compiled[1]], "sm_90")
    shape = (1, 5, 4, 60, 104)
    latent = 2 * 5 * 4 * 60 * 104
    expected = {
        "relation_loss": [("RelationPass", 3), ("FinishPass", 0), ("GradientPass", 1)],
        "codmd_loss": [("DmdPass", 4), ("DmdFinishPass", 0), ("FinishPass", 0), ("GradientPass", 4)],
    }
    for op, passes in expected.items():
        launches = extension.recorded_launches(made, op, shape)
        assert [(launched.kernel, launched.moved / latent) for launched in launches] == passes
        for launched in launches:
            found = model(launched, 3.35e12)
            assert (launched.warps, launched.registers <= 128) == (8, True)
            assert 100 < found.instructions < 20_000
            assert found.program > found.instructions
            assert launched.kernel != "RelationPass" or found.loads == 3 * 4, "780 chunks of a plane, 256 threads"
        assert sum(model(launched, 3.35e12).barriers for launched in launches) > 5


@pytest.mark.slow
def test_a_launch_that_fails_names_the_kernel_and_the_error(recording):
    module, runtime = recording
    runtime.forget(719)
    with pytest.raises(RuntimeError, match=r"^codmd: kernel relation_pass: asked to fail \(cudaErrorRecorded\)$"):
        forward(module, (1, 1))
    with pytest.raises(RuntimeError, match="kernel gradient_pass: asked to fail"):
        backward(module, (1, 1))
    with pytest.raises(RuntimeError, match=r"selecting the device: invalid device ordinal \(cudaErrorInvalidDevice\)"):
        forward(module, (1, 1), device=7)
    assert runtime.recorded_device() == 0
    assert module.device_problem(0) == ""
    assert module.device_problem(7) == "invalid device ordinal (cudaErrorInvalidDevice)"


def bodies(compiled, source, kernel):
    """PTX of that kernel's entries for the newest architecture."""
    archs, objects = compiled
    (folder,) = {Path(name).parent for name, _ in objects}
    suffix = f".compute_{archs[-1]}" if len(archs) > 1 else ""
    text = (folder / f"{source}{suffix}.ptx").read_text()
    entries = re.findall(r"\.entry (\S+?)\((.*?)\n}", text, re.DOTALL)
    return [body for name, body in entries if kernel_of(name) == kernel]


def test_latents_are_read_sixteen_bytes_at_a_time(compiled):
    passes, writes = bodies(compiled, "relation", "RelationPass"), bodies(compiled, "dmd", "GradientPass")
    assert (len(passes), len(writes)) == (3, 6)
    assert all(len(re.findall(r"ld\.global\.nc\.v4\.[ubf]32", body)) == 3 for body in passes)
    assert all(re.search(r"st\.global\.v4\.[ubf]32", body) for body in writes)


def test_the_last_block_is_chosen_between_fences_and_barriers(compiled):
    """In the code that nvcc makes: barrier, fence, the counter that wraps to 0, fence, barrier."""
    (body,) = bodies(compiled, "pooled", "FinishPass")
    steps = re.findall(r"\b(bar(?:rier)?\.(?:cta\.)?sync|membar\.gl|fence\.\w+\.gpu|atom\.global\.inc\.u32)\b", body)
    ticket = steps.index("atom.global.inc.u32")
    assert steps.count("atom.global.inc.u32") == 1
    assert all("bar" in step and "membar" not in step for step in (steps[ticket - 2], steps[ticket + 2]))
    assert all("membar" in step or "fence" in step for step in (steps[ticket - 1], steps[ticket + 1]))


@pytest.mark.every
def test_turing_is_built_when_asked_for(toolkit, tmp_path):
    """It has no instruction that rounds to bfloat16."""
    if 75 not in toolkit.known:
        pytest.skip(f"{toolkit.nvcc} does not know sm_75")
    command = nvcc.compile_command(toolkit, [75], "csrc/cuda/dmd.cu", str(tmp_path / "dmd.o"), "-Xptxas=-v")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = reports(done.stdout + done.stderr)
    assert {(kernel, arch) for kernel, arch, _, _ in found} == {
        ("DmdPass", 75),
        ("DmdFinishPass", 75),
        ("DecoupledPass", 75),
        ("DecoupledGradientPass", 75),
        ("GradientPass", 75),
    }
    assert not [report for report in found if report[2]], "spills"
