"""Registers, spills and memory accesses of every compiled kernel, without a GPU: ``python -m benchmarks.static``.

Every configuration that :mod:`benchmarks.static_cases` records is compiled ahead of time for sm_80, sm_90, sm_100 and
gfx942, by as many processes as there are cores. Registers, spills and shared memory come from the compiled binary
(``cuobjdump -res-usage``, or the metadata of the AMD assembly); vector accesses and the barrier before each "last
block done" ticket are read off the PTX (assembly). The barrier is looked for in Triton's IR as well: a release of
Triton that emits barriers of its own must not hide that the kernel lacks one. On AMD GPUs every wave must wait for its
stores before that barrier.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.static_budgets import Report, excesses
from benchmarks.static_cases import CASES
from codmd.kernels.launch import Launch, assuming

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


def specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Signature, constants and divisibility attributes, by the rules of Triton's own launcher."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, (name, value) in enumerate(launch.values.items()):
        parameter = launch.launcher.kernel.params[i]
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible = not parameter.do_not_specialize_on_alignment
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[(i,)], divisible = "constexpr", value, False
            if isinstance(value, float):
                del constants[(i,)]
                signature[name] = "fp32"
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def guarded(text: str, ticket: str, store: str, *guards: str) -> tuple[int, int]:
    """(atomics, atomics before which the ``guards`` stand, the last one first, and no store between them)."""
    lines = text.splitlines()
    found = kept = 0
    for number, line in enumerate(lines):
        if not re.search(ticket, line):
            continue
        found += 1
        wanted = list(guards)
        for before in reversed(lines[:number]):
            if re.search(wanted[-1], before):
                wanted.pop()
            if not wanted or re.search(store, before):
                break
        kept += not wanted
    return found, kept


NVIDIA_TICKET = r"\batom\.", r"\bst\.global", r"\bbar\.sync"
AMD_TICKET = (
    r"(global|buffer)_atomic_add", r"(global|buffer)_store", r"\bs_waitcnt\b.*\bvmcnt\(0\)", r"\bs_barrier\b",
)  # fmt: skip
"""What :func:`guarded` looks for in PTX and in AMD's assembly: there a barrier waits for no store by itself."""


def _tickets(compiled: Any, machine: tuple[int, int]) -> tuple[int, int]:
    """(tickets, those guarded in Triton's IR and in the machine's code)."""
    written = guarded(compiled.asm["ttir"], r"tt\.atomic_rmw", r"tt\.store", r"\bbarrier\b")
    if written[0] != machine[0]:
        raise RuntimeError(f"{written[0]} atomics in the IR, {machine[0]} in the machine's code")
    return machine[0], min(machine[1], written[1])


MULTIPLIED = ("gram_kernel", "gram_batch_kernel", "apply_kernel", "apply_batch_kernel")
"""Kernels that multiply latents."""


def chained(ttir: str) -> int:
    """Products of Triton's IR that add to anything but zero and other products."""
    dots = dict(re.findall(r"(%[\w#:]+) = tt\.dot [^,]+, [^,]+, (%[\w#]+)", ttir))
    return sum(start not in dots and not start.startswith("%cst") for start in dots.values())


def _products(launch: Launch, code: str, instruction: str, compiled: Any) -> tuple[str, int, int, int]:
    """Of a kernel that multiplies latents: their dtype, products of half precision, of TF32, and carried ones."""
    if launch.name not in MULTIPLIED:
        return "", 0, 0, 0
    dtype = str(launch.values["student"].dtype).removeprefix("torch.")
    products = re.findall(instruction, code)
    half = sum("tf32" not in p and "xf32" not in p for p in products)
    return dtype, half, len(products) - half, chained(compiled.asm["ttir"]) if half else 0


def _nvidia(launch: Launch, target: str, compiled: Any) -> Report:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", binary.name], capture_output=True, text=True, check=True)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    tickets, kept = _tickets(compiled, guarded(ptx, *NVIDIA_TICKET))
    return Report(
        launch.name, target, numbers["REG"], numbers["STACK"], numbers["LOCAL"], compiled.metadata.shared,
        len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)), len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
        tickets, kept,
        *_products(launch, ptx, r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*", compiled),
    )  # fmt: skip


def _amd(launch: Launch, target: str, compiled: Any) -> Report:
    assembly = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found is not None, key
        return int(found.group(1))

    tickets, kept = _tickets(compiled, guarded(assembly, *AMD_TICKET))
    return Report(
        launch.name, target, number("vgpr_count"), number("vgpr_spill_count"), number("private_segment_fixed_size"),
        compiled.metadata.shared,
        len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly)), tickets, kept,
        *_products(launch, assembly, r"\bv_mfma_f32\w*", compiled),
    )  # fmt: skip


def links_for_amd() -> bool:
    """Whether code for AMD GPUs can be linked: some older releases of Triton need an ``ld.lld`` beside them."""
    from triton.backends.amd.compiler import HIPBackend

    find = getattr(HIPBackend, "path_to_rocm_lld", None)
    try:
        return find is None or bool(find())
    except Exception as error:  # Triton's own type, when there is none.
        if "linker" not in str(error):
            raise
        return False


def compiled_for(launch: Launch, target: str) -> Any:
    """Triton's ``CompiledKernel`` of one recorded launch for ``target``."""
    source = ASTSource(launch.launcher.kernel, *specialise(launch))
    gpu = TARGETS[target]
    return triton.compile(source, target=gpu, options=launch.launcher.options(gpu.backend))


def compile_ahead(launch: Launch, target: str) -> Report:
    """Compile one recorded launch for ``target`` and read off what it uses."""
    read = _nvidia if TARGETS[target].backend == "cuda" else _amd
    return read(launch, target, compiled_for(launch, target))


def _configuration(launch: Launch, target: str) -> str:
    """Two launches of the same configuration compile to the same code."""
    return repr((launch.name, specialise(launch), launch.launcher.options(TARGETS[target].backend), target))


def _compile_case(case: str, number: int, target: str) -> Report:
    return compile_ahead(recorded(case, target)[number], target)


def recorded(case: str, target: str) -> list[Launch]:
    """The launches of a case with the tiles that ``target`` gets."""
    with assuming(target):
        return CASES[case]()


def reports(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Report]]:
    """(case, report) of every launch of every (case, target); a configuration is compiled once."""
    compiled: dict[str, Future[Report]] = {}
    found: list[tuple[str, Future[Report]]] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for case, target in pairs:
            for number, launch in enumerate(recorded(case, target)):
                key = _configuration(launch, target)
                if key not in compiled:
                    compiled[key] = pool.submit(_compile_case, case, number, target)
                found.append((case, compiled[key]))
        for case, report in found:
            yield case, report.result()


def main() -> int:
    """Print the table; status 1 when something exceeds what :mod:`benchmarks.static_budgets` allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    options = parser.parse_args()
    print("| case | kernel | target | registers | spilled | local | shared B | 16-byte loads | stores | tickets |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    exceeded = []
    for case, r in reports(product(options.cases, options.targets)):
        exceeded += [f"{case}: {r.kernel} on {r.target}: {excess}" for excess in excesses(case, r)]
        print(
            f"| {case} | `{r.kernel}` | {r.target} | {r.registers} | {r.spilled} | {r.local} | {r.shared} "
            f"| {r.wide_loads} | {r.wide_stores} | {r.guarded}/{r.tickets} |",
            flush=True,
        )
    print("\n".join(exceeded), file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
