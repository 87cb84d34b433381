"""Machine code of NVIDIA GPUs as ``nvdisasm -c -hex`` prints it: instructions with the scheduling that they carry.

The upper bits of a 128-bit instruction say how long the warp waits before its next one (the result of every
instruction of fixed latency is covered by it), which of six scoreboards the instruction sets when its result arrives or
its operands were read, and which it waits for. (Jia et al., arXiv 1804.06826, section 2.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

NO_SCOREBOARD = 7
_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/"
)
_UPPER = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"^(\.?[\w$.]+):\s*$")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_REFERENCE = re.compile(r"`\((.*)\)")


class Unreadable(ValueError):
    """Code that this reader does not understand."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``opcode`` with its modifiers, ``operands`` as printed, and its scheduling."""

    address: int
    guard: str | None
    opcode: str
    operands: tuple[str, ...]
    stall: int
    sets: int  # scoreboard of the result, or NO_SCOREBOARD
    reads: int  # scoreboard of the operands, or NO_SCOREBOARD
    waits: int  # one bit a scoreboard

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".", 1)[0]

    def target(self) -> str | None:
        """The label that it names, if it does."""
        found = _REFERENCE.search(self.operands[-1]) if self.operands else None
        return found.group(1) if found else None


@dataclass
class Code:
    """A kernel: its instructions in order, and the index of the instruction at each label."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def jump(self, i: int) -> int:
        """Where branch ``i`` goes.

        Raises:
            Unreadable: its target is no label of this kernel.
        """
        instruction = self.instructions[i]
        label = instruction.target()
        if label not in self.labels:
            raise Unreadable(f"{instruction.opcode} at {instruction.address:#x} goes to no known label")
        return self.labels[label]


def split_operands(text: str) -> tuple[str, ...]:
    """Operands between commas, those inside brackets left alone."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return (*parts, text[start:].strip()) if text.strip() else ()


def parse(lines: Iterable[str]) -> dict[str, Code]:
    """Kernels by name.

    Raises:
        Unreadable: an instruction without its encoding, or before any kernel.
    """
    kernels: dict[str, Code] = {}
    code: Code | None = None
    pending: re.Match[str] | None = None
    for line in lines:
        if pending is not None:
            upper = _UPPER.match(line)
            if upper is None or code is None:
                raise Unreadable(f"no upper half of an instruction: {line.strip()!r}")
            control = int(upper.group(1), 16) >> 41
            address, guard, opcode, operands, _ = pending.groups()
            code.instructions.append(
                Instruction(
                    int(address, 16), guard, opcode, split_operands(operands), control & 15, control >> 5 & 7,
                    control >> 8 & 7, control >> 11 & 63,
                )
            )  # fmt: skip
            pending = None
        elif found := _SECTION.match(line):
            code = kernels.setdefault(found.group(1), Code())
        elif code is not None and (found := _LABEL.match(line)):
            code.labels[found.group(1)] = len(code.instructions)
        elif found := _INSTRUCTION.search(line):
            pending = found
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line):
            raise Unreadable(f"no instruction with its encoding: {line.strip()!r}")
    return kernels
