"""The control flow of a kernel: what a branch that data decides may be."""

from __future__ import annotations

from functools import cached_property

from benchmarks.latency.sass import Code

EXIT = -1
"""The successor of an instruction that ends its thread."""


class Flow:
    """Successors, loops and the two sides of branches, by the index of an instruction."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.next = [self._successors(i) for i in range(len(code.instructions))]

    def _successors(self, i: int) -> tuple[int, ...]:
        instruction = self.code.instructions[i]
        after = i + 1 if i + 1 < len(self.code.instructions) else EXIT
        if instruction.base == "BRA":
            conditional = instruction.guard is not None or len(instruction.operands) > 1
            return (after, self.code.jump(i)) if conditional else (self.code.jump(i),)
        if instruction.base in ("EXIT", "RET"):
            conditional = instruction.guard is not None or (instruction.base == "EXIT" and instruction.operands)
            return (after, EXIT) if conditional else (EXIT,)
        return (after,)

    def reach(self, start: int, without: int) -> set[int]:
        """Instructions that can follow from ``start`` on, itself included, without passing ``without``."""
        found: set[int] = set()
        waiting = [start]
        while waiting:
            i = waiting.pop()
            if i not in (EXIT, without) and i not in found:
                found.add(i)
                waiting.extend(self.next[i])
        return found

    @cached_property
    def dominators(self) -> list[int]:
        """Of every instruction, one bit for each that every path from the entry to it passes."""
        count = len(self.next)
        before: list[list[int]] = [[] for _ in range(count)]
        for i, successors in enumerate(self.next):
            for successor in successors:
                if successor != EXIT:
                    before[successor].append(i)
        everything = (1 << count) - 1
        found = [everything] * count
        found[0] = 1
        changed = True
        while changed:
            changed = False
            for i in range(1, count):
                meet = everything
                for j in before[i]:
                    meet &= found[j]
                new = (meet if before[i] else 0) | 1 << i
                if new != found[i]:
                    found[i], changed = new, True
        return found

    @cached_property
    def loops(self) -> list[tuple[int, set[int]]]:
        """(header, instructions) of every natural loop, the smallest first; back edges to one header are one loop."""
        before: list[list[int]] = [[] for _ in self.next]
        for i, successors in enumerate(self.next):
            for successor in successors:
                if successor != EXIT:
                    before[successor].append(i)
        bodies: dict[int, set[int]] = {}
        for i, successors in enumerate(self.next):
            for header in successors:
                if header != EXIT and self.dominators[i] >> header & 1:
                    body = bodies.setdefault(header, {header})
                    waiting = [i]
                    while waiting:
                        j = waiting.pop()
                        if j not in body:
                            body.add(j)
                            waiting.extend(before[j])
        return sorted(bodies.items(), key=lambda item: len(item[1]))

    def decides_a_loop(self, i: int) -> bool:
        """Whether branch ``i`` leaves its innermost loop or starts it again."""
        for header, body in self.loops:
            if i in body:
                return any(successor == header or successor not in body for successor in self.next[i])
        return False

    def sides(self, i: int) -> tuple[set[int], set[int]]:
        """The instructions that one side of branch ``i`` alone runs before both meet: going on, and branching."""
        on, off = (self.reach(successor, i) for successor in self.next[i])
        return on - off, off - on
