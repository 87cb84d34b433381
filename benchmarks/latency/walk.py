"""A walk of one warp through a kernel: in-order issue, the waits that the code asks for, stated latencies.

The warp issues an instruction when the stall of the one before is over and the scoreboards that it waits for are
clear. Stalls are the assembler's; results of variable latency clear their scoreboard after ``LATENCIES`` cycles. Warps
of a block run alike, four at a time: with more, an instruction takes as many cycles as warps share a scheduler.

Branches follow the values of the launch. Those that data decides go the usual way: past the helper of a division or a
root, else the longer side. A loop whose trips data decides is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.latency.flow import EXIT, Flow
from benchmarks.latency.sass import NO_SCOREBOARD, Code, Instruction, Unreadable
from benchmarks.latency.values import DATA, TICKET, State, Unknown, address_of, step_of, truth

CLOCK_HZ = 1.755e9
SCHEDULERS = 4
LINE = 128
"""Bytes of a line of the L1 cache."""

L1, L2, DRAM = 36, 270, 650
"""Cycles of a load that hits a cache; of one of latents, which no cache holds, without a queue."""

BARRIER, FENCE, READ = 28, 500, 10
"""Cycles that the warp stands still at a barrier or at MEMBAR.GPU; until a store has read its operands."""

MMA, WGMMA = 33, 32
"""Cycles of a tensor core's result; of a warp group's beyond N/2 for its N columns."""

LATENCIES = {
    **dict.fromkeys(("LDS", "LDSM", "FENCE"), 26),
    "SHFL": 25,
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "UPOPC", "FLO", "BREV", "FCHK", "REDUX"), 22),
    **dict.fromkeys(("S2R", "S2UR", "VOTEU", "R2UR", "CREDUX"), 22),
    **dict.fromkeys(("LDC", "ULDC", "LDCU", "LDL"), 36),
    **dict.fromkeys(("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"), 16),
    **dict.fromkeys(("ATOM", "ATOMG"), 700),
    "ATOMS": 60,
}
"""Cycles until a result of variable latency is there."""

MOST_STEPS = 20_000_000


class DataDecides(ValueError):
    """The trips of a loop, or the target of a jump, do not follow from the launch."""


@dataclass(frozen=True)
class Program:
    """One block of a launch as the walk sees it.

    Args:
        constants: bytes of each constant bank; the parameters of the launch are in bank 0.
        special: special registers of the first thread, ``SR_CTAID.X`` among them.
        warps: of the block.
        uncached: address ranges of what comes from memory and not from a cache, as (first, last).
        last: whether it takes the last ticket.
    """

    constants: dict[int, bytes]
    special: dict[str, int]
    warps: int
    uncached: tuple[tuple[int, int], ...] = ()
    last: bool = False


@dataclass
class Walk:
    """What the walk found."""

    cycles: float = 0.0
    instructions: int = 0
    barriers: int = 0
    loads: int = 0
    dependent_loads: int = 0
    waited: Counter[str] = field(default_factory=Counter)
    """Cycles that the warp stood still, by what for."""


class _Issue:
    """The timing of one instruction, decoded."""

    __slots__ = (
        "address", "base", "blocks", "group", "guard", "index", "is_load", "latency", "needs", "opcode", "pending",
        "reads", "sets", "stall", "step", "strong", "waits", "width",
    )  # fmt: skip

    def __init__(self, index: int, instruction: Instruction, cadence: float) -> None:
        self.index = index
        self.base, self.opcode = instruction.base, instruction.opcode
        self.guard = truth(instruction.guard) if instruction.guard else None
        self.step = step_of(instruction)
        self.stall = max(instruction.stall, cadence)
        self.sets, self.reads = instruction.sets, instruction.reads
        self.waits = [k for k in range(6) if instruction.waits >> k & 1]
        self.is_load = self.base in ("LDG", "LD")
        memory = next((o for o in instruction.operands if re.match(r"(desc\[.*\])?\[", o)), None)
        self.address = address_of(memory) if self.is_load and memory else None
        self.strong = "STRONG" in self.opcode
        self.blocks = {"BAR": BARRIER, "MEMBAR": FENCE if "GPU" in self.opcode else BARRIER}.get(self.base, 0)
        if self.base == "BAR" and "ARV" in self.opcode:
            self.blocks = 0
        self.latency = 0 if self.is_load else LATENCIES.get(self.base)
        if self.sets != NO_SCOREBOARD and self.latency is None and self.base not in ("LDGDEPBAR", "HGMMA"):
            raise Unreadable(f"no latency is known for {self.opcode}")
        is_mma = self.base.endswith("MMA") and self.base != "HFMA2" and self.base != "HGMMA"
        registers = [re.findall(r"(?<!U)R\d+", o) for o in instruction.operands]
        self.width = [f"R{int(r[1:]) + k}" for r in registers[0] for k in range(4)] if is_mma else []
        self.needs = {f"R{int(r[1:]) + k}" for o in registers for r in o for k in range(4 if is_mma else 1)}
        columns = re.search(r"\.64x(\d+)x", self.opcode)
        self.group = int(columns.group(1)) / 2 if columns else 0.0
        self.pending = _pending(instruction) if self.base == "DEPBAR" else None


def _pending(instruction: Instruction) -> tuple[int, int, tuple[int, ...]]:
    """(scoreboard, results of it that may be on their way, scoreboards that must be clear) of a DEPBAR."""
    first = instruction.operands[0] if instruction.operands else ""
    rest = re.findall(r"\d+", instruction.operands[-1]) if instruction.operands[-1].startswith("{") else []
    if not first.startswith("SB"):
        return 0, 1 << 30, tuple(int(k) for k in rest)
    allowed = int(instruction.operands[1], 16) if instruction.operands[1].startswith("0x") else 0
    return int(first[2:]), allowed, tuple(int(k) for k in rest)


class Kernel:
    """A kernel's code, decoded once for any number of walks."""

    def __init__(self, code: Code, warps: int) -> None:
        self.code = code
        self.flow = Flow(code)
        cadence = max(1.0, warps / SCHEDULERS)
        self.issues = [_Issue(i, instruction, cadence) for i, instruction in enumerate(code.instructions)]
        self.takes_tickets = any(issue.base in ("ATOM", "ATOMG") for issue in self.issues)
        self._choices: dict[int, bool] = {}

    def usual(self, i: int) -> bool:
        """Whether branch ``i``, which data decides, is taken.

        Raises:
            DataDecides: it decides how often a loop runs.
        """
        if i not in self._choices:
            instruction = self.code.instructions[i]
            if self.flow.decides_a_loop(i):
                raise DataDecides(f"data decides the trips of the loop at {instruction.address:#x}")
            on, off = self.flow.sides(i)
            slow_on, slow_off = (any(self.issues[k].base == "CALL" for k in side) for side in (on, off))
            self._choices[i] = slow_on if slow_on != slow_off else len(off) > len(on)
        return self._choices[i]

    def branch(self, issue: _Issue, state: State) -> bool:
        """Whether a BRA, EXIT, CALL or RET is taken."""
        taken = issue.guard(state) if issue.guard else True
        instruction = self.code.instructions[issue.index]
        if issue.base in ("BRA", "EXIT"):
            if "DIV" in issue.opcode.split("."):
                return False  # only a warp whose threads went apart
            for operand in instruction.operands[: len(instruction.operands) - (issue.base == "BRA")]:
                more = truth(operand)(state)
                if taken is False or more is False:
                    return False
                taken = more if taken is True else taken
        if issue.base == "BRA":
            if taken is TICKET and not state.last:
                return not self.usual(issue.index)
            return self.usual(issue.index) if isinstance(taken, Unknown) else taken
        return taken is True

    def walk(self, program: Program) -> Walk:
        """From the entry to the thread's end.

        Raises:
            DataDecides: the way does not follow from the launch.
        """
        state = State(program.constants, program.special, program.last)
        found = Walk()
        time = 0.0
        finish: list[list[float]] = [[] for _ in range(6)]
        kinds = [""] * 6
        results: dict[str, float] = {}
        copies, group = 0.0, 0.0
        lines: set[int] = set()
        calls: list[int] = []
        i = 0
        while i != EXIT:
            issue = self.issues[i]
            found.instructions += 1
            if found.instructions > MOST_STEPS:
                raise DataDecides(f"no end after {MOST_STEPS} instructions")
            for_load = False
            for k in issue.waits:
                if finish[k]:
                    ready = max(finish[k])
                    if ready > time:
                        found.waited[kinds[k]] += ready - time
                        for_load |= kinds[k] in ("LDG", "LD")
                        time = ready
                    finish[k].clear()
            found.dependent_loads += for_load
            if results:
                for name in issue.needs & results.keys():
                    ready = results.pop(name)
                    if ready > time:
                        found.waited["MMA"] += ready - time
                        time = ready
            holds = issue.guard(state) if issue.guard else True
            if issue.pending is not None:
                board, allowed, clear = issue.pending
                arriving = sorted(finish[board])
                ready = max([time, *arriving[: len(arriving) - allowed], *(t for k in clear for t in finish[k])])
                found.waited["DEPBAR"] += ready - time
                time = ready
            if holds is not False:
                if issue.is_load:
                    found.loads += 1
                    latency = self._latency(issue, state, program, lines)
                else:
                    latency = issue.latency or 0
                if issue.base == "LDGSTS":
                    copies = max(copies, time + DRAM)
                elif issue.base == "LDGDEPBAR":
                    latency = int(max(0.0, copies - time))
                elif issue.base == "HGMMA":
                    group = max(group, time) + issue.group
                elif issue.base == "WARPGROUP" and "DEPBAR" in issue.opcode:
                    ready = max(time, group + WGMMA)
                    found.waited["MMA"] += ready - time
                    time = ready
                elif issue.base == "CCTL":
                    lines.clear()
                if issue.sets != NO_SCOREBOARD:
                    finish[issue.sets].append(time + latency)
                    kinds[issue.sets] = issue.base
                if issue.reads != NO_SCOREBOARD:
                    finish[issue.reads].append(time + READ)
                    kinds[issue.reads] = kinds[issue.reads] or "operands"
                for name in issue.width:
                    results[name] = time + MMA
                if issue.blocks:
                    found.barriers += issue.base == "BAR"
                    found.waited[issue.base] += issue.blocks
                    time += issue.blocks
            found.waited["issue"] += issue.stall
            time += issue.stall
            i = self._next(issue, state, calls)
        found.cycles = time
        return found

    def _latency(self, issue: _Issue, state: State, program: Program, lines: set[int]) -> int:
        """Cycles of a load from the memory level where its line is."""
        at = issue.address(state) if issue.address else DATA
        if not isinstance(at, int):
            return L2
        if any(first <= at < last for first, last in program.uncached):
            return DRAM
        known = at // LINE in lines
        lines.add(at // LINE)
        return L1 if known and not issue.strong else L2

    def _next(self, issue: _Issue, state: State, calls: list[int]) -> int:
        i = issue.index
        if issue.base == "BRA":
            return self.code.jump(i) if self.branch(issue, state) else i + 1
        if issue.base == "EXIT":
            return EXIT if self.branch(issue, state) else i + 1
        if issue.base == "CALL" and self.branch(issue, state):
            calls.append(i + 1)
            return self.code.jump(i)
        if issue.base == "RET" and self.branch(issue, state):
            if not calls:
                raise DataDecides(f"a return without a call at {self.code.instructions[i].address:#x}")
            return calls.pop()
        if issue.base in ("BRX", "JMP", "JMX", "BRXU"):
            raise DataDecides(f"{issue.opcode} at {self.code.instructions[i].address:#x} jumps to a computed address")
        issue.step(state)
        return i + 1
