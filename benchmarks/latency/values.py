"""Integer instructions of a warp's first thread: values where the launch determines them, else what they came from.

Sizes, strides, addresses and loop counters follow from the parameters of a launch, so branches and trip counts do. What
is loaded is ``DATA``, the result of an atomic a ``TICKET``; both spread through every instruction that they enter.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from benchmarks.latency.sass import Instruction, Unreadable

MASK = 0xFFFFFFFF


class Unknown(Enum):
    """A value that the launch does not determine."""

    DATA = "data"
    TICKET = "ticket"


@dataclass(frozen=True)
class Bits:
    """A word of which the bits set in ``known`` are those of ``value``: predicates are kept in such words."""

    value: int
    known: int


DATA, TICKET = Unknown.DATA, Unknown.TICKET
Value = int | Unknown | Bits
Truth = bool | Unknown

TRUE = 7
"""Place of the predicate that is always true."""


def unknown(*values: object) -> Unknown | None:
    """What the result of ``values`` is because of an unknown one of them; None if all are known."""
    found = None
    for value in values:
        if value is TICKET:
            return TICKET
        if value is DATA or isinstance(value, Bits):
            found = DATA
    return found


def bits_known(value: Value) -> tuple[int, int]:
    """(value, known bits) of a word."""
    return (
        (value, MASK) if isinstance(value, int) else (value.value, value.known) if isinstance(value, Bits) else (0, 0)
    )


def merged(a: Value, b: Value) -> Value:
    """What is known of a word that is ``a`` or ``b``."""
    (x, x_known), (y, y_known) = bits_known(a), bits_known(b)
    known = x_known & y_known & ~(x ^ y)
    return x if known == MASK else Bits(x & known, known) if known else unknown(a, b) or DATA


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def float_of(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def bits_of(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


class State:
    """Registers, predicates and shared memory of the thread, and what it knows of its launch."""

    def __init__(self, constants: dict[int, bytes], special: dict[str, int], last: bool) -> None:
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, Truth] = {}
        self.shared: dict[int, Value] = {}
        self.constants = constants
        self.special = special
        self.last = last

    def constant(self, bank: int, offset: int) -> Value:
        """Four bytes of a constant bank."""
        memory = self.constants.get(bank, b"")
        return struct.unpack_from("<I", memory, offset)[0] if 0 <= offset <= len(memory) - 4 else DATA


_REGISTER = re.compile(r"^([-~]?)(\|?)(U?R)(\d+|Z)\|?((?:\.\w+)*)$")
_NUMBER = re.compile(r"^[-~]?0x[0-9a-f]+$")
_CONSTANT = re.compile(r"^([-~]?)(\|?)c\[(0x[0-9a-f]+)\]\[(?:(U?R\d+|U?RZ)\+?)?(-?0x[0-9a-f]+)?\]\|?((?:\.\w+)*)$")
_PREDICATE = re.compile(r"^(!?)(U?P[\dT])$")

Read = Callable[[State], Value]
PLAIN = {"", ".reuse", ".64", ".U32", ".reuse.U32"}


def is_predicate(operand: str) -> bool:
    return _PREDICATE.match(operand) is not None


def following(name: str, step: int) -> str:
    """The register ``step`` places after ``name``."""
    letters = "UR" if name.startswith("UR") else "R"
    number = name[len(letters) :]
    return name if number == "Z" else f"{letters}{int(number) + step}"


def reader(operand: str, part: int = 0) -> Read:
    """A function that reads 32 bits of an operand: the low ones, or the high ones of a pair (``part`` 1)."""
    if found := _REGISTER.match(operand):
        sign, absolute, letters, number, modifiers = found.groups()
        if absolute or modifiers not in PLAIN:
            return lambda state: DATA
        if number == "Z":
            return lambda state: MASK if sign == "~" else 0
        name = following(letters + number, part)
        if not sign:
            return lambda state: state.registers.get(name, DATA)
        flip: Callable[[int], int] = (lambda v: -v & MASK) if sign == "-" else (lambda v: v ^ MASK)

        def read(state: State) -> Value:
            value = state.registers.get(name, DATA)
            return flip(value) if isinstance(value, int) else unknown(value) or DATA

        return read
    if _NUMBER.match(operand):
        value = int(operand.lstrip("~"), 16)
        value = ~value if operand.startswith("~") else value
        return lambda state: value >> 32 * part & MASK
    if found := _CONSTANT.match(operand):
        sign, absolute, bank, register, offset, modifiers = found.groups()
        place, at = int(bank, 16), int(offset or "0", 16) + 4 * part
        index = reader(register) if register else None
        if absolute or modifiers not in PLAIN:
            return lambda state: DATA

        def load(state: State) -> Value:
            shift = index(state) if index else 0
            value = state.constant(place, shift + at) if isinstance(shift, int) else DATA
            if not isinstance(value, int) or not sign:
                return value
            return -value & MASK if sign == "-" else value ^ MASK

        return load
    try:
        bits = bits_of(float(operand.replace("+INF", "inf").replace("-INF", "-inf").replace("+QNAN", "nan")))
    except ValueError:
        return lambda state: DATA
    return lambda state: bits


def truth(operand: str) -> Callable[[State], Truth]:
    """A function that reads a predicate."""
    found = _PREDICATE.match(operand)
    if found is None:
        return lambda state: DATA
    negated, name = bool(found.group(1)), found.group(2)
    if name.endswith("T"):
        return lambda state: not negated

    def read(state: State) -> Truth:
        value = state.predicates.get(name, DATA)
        return value if isinstance(value, Unknown) else value != negated

    return read


def writer(operand: str) -> Callable[[State, Value], None]:
    """A function that writes a register."""
    found = _REGISTER.match(operand)
    if found is None:
        raise Unreadable(f"{operand!r} is no register")
    if found.group(4) == "Z":
        return lambda state, value: None
    name = found.group(3) + found.group(4)

    def write(state: State, value: Value) -> None:
        state.registers[name] = value

    return write


def set_truth(operand: str) -> Callable[[State, Truth], None]:
    """A function that writes a predicate."""
    name = operand.lstrip("!")

    def write(state: State, value: Truth) -> None:
        if not name.endswith("T"):
            state.predicates[name] = value

    return write


Step = Callable[[State], None]


def _plain(function: Callable[..., int]) -> Callable[[Instruction], Step]:
    """Of ``Rd, sources``: ``function`` of the known sources, modulo 2^32."""

    def compile_one(instruction: Instruction) -> Step:
        write = writer(instruction.operands[0])
        sources = [reader(o) for o in instruction.operands[1:] if not is_predicate(o)]

        def step(state: State) -> None:
            values = [read(state) for read in sources]
            write(state, unknown(*values) or function(*values) & MASK)

        return step

    return compile_one


def _split(instruction: Instruction) -> tuple[str, list[str], list[str], list[str]]:
    """(destination, predicates written, sources, predicates read)."""
    first, *rest = instruction.operands
    written: list[str] = []
    while rest and is_predicate(rest[0]) and not rest[0].startswith("!"):
        written.append(rest.pop(0))
    sources = [o for o in rest if not is_predicate(o)]
    return first, written, sources, [o for o in rest if is_predicate(o)]


def _carries(instruction: Instruction, carries_in: list[str]) -> Callable[[State], Truth | int]:
    reads = [truth(o) for o in carries_in] if ".X" in instruction.opcode else []

    def read(state: State) -> Truth | int:
        values = [r(state) for r in reads]
        return unknown(*values) or sum(bool(v) for v in values)

    return read


def _sum(instruction: Instruction) -> Step:
    """IADD3, UIADD3, VIADD, IADD: sums with carries; two halves at once with ``.64``."""
    target, written, sources, carries_in = _split(instruction)
    wide = ".64" in instruction.opcode
    bits = 64 if wide else 32
    write = _writer_of_pair(target) if wide else writer(target)
    # A negated source is its complement and one, so that its carry is right for 0 as well.
    negative = [s.startswith("-") and not _NUMBER.match(s) for s in sources]
    reads = [_reader_of_pair(s.lstrip("-")) if wide else reader(s.lstrip("-") if n else s)
             for s, n in zip(sources, negative, strict=True)]  # fmt: skip
    carry_in = _carries(instruction, carries_in)
    flags = [set_truth(w) for w in written]

    def step(state: State) -> None:
        values = [read(state) for read in reads]
        more = carry_in(state)
        missing = unknown(*values, more)
        if missing:
            total: Value = missing
        else:
            terms = [(v ^ ((1 << bits) - 1)) + 1 if n else v for v, n in zip(values, negative, strict=True)]
            exact = sum(terms) + int(more)
            total = exact & ((1 << bits) - 1)
        write(state, total)
        for k, flag in enumerate(flags):
            flag(state, missing or (exact >> bits > k))

    return step


def _reader_of_pair(operand: str) -> Read:
    low, high = reader(operand), reader(operand, 1)

    def read(state: State) -> Value:
        a, b = low(state), high(state)
        return unknown(a, b) or a | b << 32  # type: ignore[operator]

    return read


def _writer_of_pair(operand: str) -> Callable[[State, Value], None]:
    if operand.lstrip("-~") in ("RZ", "URZ"):
        return lambda state, value: None
    name = operand.split(".")[0]
    low, high = writer(name), writer(following(name, 1))

    def write(state: State, value: Value) -> None:
        low(state, value & MASK if isinstance(value, int) else value)
        high(state, value >> 32 & MASK if isinstance(value, int) else value)

    return write


def _multiply(instruction: Instruction) -> Step:
    """IMAD and UIMAD: low, high or both halves of a·b + c."""
    target, written, (a, b, c, *_), carries_in = _split(instruction)
    unsigned = ".U32" in instruction.opcode
    wide, high = ".WIDE" in instruction.opcode, ".HI" in instruction.opcode
    write = _writer_of_pair(target) if wide else writer(target)
    reads = [reader(a), reader(b), _reader_of_pair(c) if wide or high else reader(c)]
    carry_in = _carries(instruction, carries_in)
    flags = [set_truth(w) for w in written]

    def step(state: State) -> None:
        x, y, z = (read(state) for read in reads)
        more = carry_in(state)
        missing = unknown(x, y, z, more)
        carry: Truth = missing or False
        # A product with 0 is known whatever the other factor.
        if x == 0 or y == 0:
            missing, x, y = unknown(z, more), 0, 0
        if missing and isinstance(z, Bits) and more == x == 0 and not (wide or high):
            write(state, z)
        elif missing:
            write(state, missing)
        else:
            assert isinstance(x, int)
            assert isinstance(y, int)
            assert isinstance(z, int)
            product = x * y if unsigned or not (wide or high) else signed(x) * signed(y)
            total = product + z + int(more)
            carry = total >> 64 > 0
            write(state, total >> 32 & MASK if high else total & ((1 << 64) - 1) if wide else total & MASK)
        for flag in flags:
            flag(state, carry)

    return step


def _lea(instruction: Instruction) -> Step:
    """LEA: (a << s) + b, or the upper half of a 64-bit a so shifted."""
    target, written, sources, carries_in = _split(instruction)
    extended, high = ".SX32" in instruction.opcode, ".HI" in instruction.opcode
    write = writer(target)
    if not high:
        a, b, shift = sources if len(sources) == 3 else (*sources, "0x0")
        top = "RZ"
    elif extended:
        a, b, shift = sources
        top = "RZ"
    else:
        a, b, top, shift = sources
    # As in a sum, a negated b is its complement and one.
    negative = b.startswith("-") and not _NUMBER.match(b)
    reads = [reader(o) for o in (a, b.lstrip("-") if negative else b, top, shift)]
    carry_in = _carries(instruction, carries_in)
    flags = [set_truth(w) for w in written]

    def step(state: State) -> None:
        x, y, upper, s = (read(state) for read in reads)
        more = carry_in(state)
        missing = unknown(x, y, upper, s, more)
        carry: Truth = missing or False
        if missing:
            write(state, missing)
        else:
            assert isinstance(x, int)
            assert isinstance(y, int)
            assert isinstance(upper, int)
            assert isinstance(s, int)
            value = (signed(x) if extended else x | upper << 32) << (s & 31)
            term = (y ^ MASK) + 1 if negative else y
            total = (value >> 32 & MASK if high else value & MASK) + term + int(more)
            carry = total >> 32 > 0
            write(state, total & MASK)
        for flag in flags:
            flag(state, carry)

    return step


def _shift(instruction: Instruction) -> Step:
    """SHF: a pair (c:a) shifted by s, of which one half stays."""
    target, _, (a, s, *rest), _ = _split(instruction)
    opcode = instruction.opcode
    c = rest[0] if rest else "RZ"
    left, high = ".L" in opcode, ".HI" in opcode
    is_signed, wraps = ".S32" in opcode or ".S64" in opcode, ".W" in opcode
    write, reads = writer(target), [reader(o) for o in (a, s, c)]

    def step(state: State) -> None:
        low, by, top = (read(state) for read in reads)
        if missing := unknown(low, by, top):
            return write(state, missing)
        assert isinstance(low, int)
        assert isinstance(by, int)
        assert isinstance(top, int)
        by = by & 31 if wraps else min(by, 64)
        pair = low | top << 32
        if left:
            value = pair << by
            result = value >> 32 if high else value
        else:
            pair = signed(pair, 64) if is_signed else pair
            value = pair >> by
            # U32/S32 without HI take the low half; with HI the upper one.
            result = value >> 32 if high else value
        return write(state, result & MASK)

    return step


def _bits(table: int, a: int, b: int, c: int) -> int:
    result = 0
    for place in range(8):
        if table >> place & 1:
            term = (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
            result |= term
    return result & MASK


def _logic(instruction: Instruction) -> Step:
    """LOP3: any function of three words, and whether the result is not 0."""
    operands = list(instruction.operands)
    written = []
    while is_predicate(operands[0]):
        written.append(operands.pop(0))
    target, a, b, c, table = operands[:5]
    write, reads, number = writer(target), [reader(o) for o in (a, b, c)], int(table, 16)
    flags = [set_truth(w) for w in written]

    def step(state: State) -> None:
        values = [read(state) for read in reads]
        missing = unknown(*values)
        result: Value
        if missing:
            # Bits are independent, so all zeros and all ones stand for every value of unknown ones.
            words = [bits_known(v) for v in values]
            options = [(v,) if known == MASK else (v, v | ~known & MASK) for v, known in words]
            result = functools.reduce(merged, (_bits(number, *chosen) for chosen in itertools.product(*options)))
            if not isinstance(result, int):
                result = missing if missing is TICKET else result
        else:
            result = _bits(number, *values)  # type: ignore[arg-type]
        write(state, result)
        value, known = bits_known(result)
        for flag in flags:
            flag(state, True if value else False if known == MASK else missing or DATA)

    return step


def _predicate_logic(instruction: Instruction) -> Step:
    """PLOP3: two functions of three predicates."""
    first, second, a, b, c, *tables = instruction.operands
    reads, numbers = [truth(o) for o in (a, b, c)], [int(t, 16) for t in tables]
    writes = [set_truth(first), set_truth(second)]

    def step(state: State) -> None:
        values = [read(state) for read in reads]
        missing = unknown(*values)
        places = [0]
        for value in values:
            options = (0, 1) if isinstance(value, Unknown) else (int(value),)
            places = [2 * p + o for p in places for o in options]
        for write, number in zip(writes, numbers, strict=False):
            outcomes = {bool(number >> p & 1) for p in places}
            write(state, outcomes.pop() if len(outcomes) == 1 else missing or DATA)

    return step


COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
    "F": lambda a, b: False, "T": lambda a, b: True,
}  # fmt: skip
JOIN: dict[str, Callable[[bool, bool], bool]] = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}


def _joined(join: str, a: Truth, b: Truth) -> Truth:
    if isinstance(a, bool) and isinstance(b, bool):
        return JOIN[join](a, b)
    for value in (a, b):
        if isinstance(value, bool) and ((join == "AND" and not value) or (join == "OR" and value)):
            return value
    return unknown(a, b) or DATA


def _differ(a: Value, b: Value) -> bool:
    (x, x_known), (y, y_known) = bits_known(a), bits_known(b)
    return (x ^ y) & x_known & y_known != 0


def _compare(instruction: Instruction) -> Step:
    """ISETP: a comparison joined with a predicate, and its opposite."""
    _, name, *modifiers = instruction.opcode.split(".")
    if name not in COMPARE:
        raise Unreadable(f"{instruction.opcode}: no such comparison")
    join = next((m for m in modifiers if m in JOIN), "AND")
    unsigned, wide = any(m in ("U32", "U64") for m in modifiers), any(m in ("64", "U64", "S64") for m in modifiers)
    first, second, a, b, also, *more = instruction.operands
    reads = [_reader_of_pair(o) if wide else reader(o) for o in (a, b)]
    joined_with, lower = truth(also), truth(more[0]) if "EX" in modifiers and more else None
    writes = [set_truth(first), set_truth(second)]
    compare = COMPARE[name]

    def step(state: State) -> None:
        x, y = (read(state) for read in reads)
        also = joined_with(state)
        found: Truth
        if isinstance(x, int) and isinstance(y, int):
            if not unsigned:
                x, y = signed(x, 64 if wide else 32), signed(y, 64 if wide else 32)
            found = compare(x, y)
            if lower is not None and x == y:
                found = lower(state)
            elif lower is not None:
                found = compare(x, y)
        elif name in ("EQ", "NE") and not wide and _differ(x, y):
            found = name == "NE"
        elif TICKET in (x, y):
            # Of all tickets the last one equals what it is compared with; the others are less.
            last = (0, 0) if state.last else (-1, 0) if x is TICKET else (0, -1)
            found = compare(*last)
        else:
            found = DATA
        opposite: Truth = found if isinstance(found, Unknown) else not found
        for write, value in zip(writes, (found, opposite), strict=True):
            write(state, _joined(join, value, also))

    return step


def _select(instruction: Instruction) -> Step:
    """SEL, FSEL: a where the predicate holds, else b."""
    target, _, (a, b), (which,) = _split(instruction)
    write, first, second, choose = writer(target), reader(a), reader(b), truth(which)

    def step(state: State) -> None:
        chosen = choose(state)
        if isinstance(chosen, Unknown):
            either = merged(first(state), second(state))
            write(state, chosen if chosen is TICKET and not isinstance(either, int) else either)
        else:
            write(state, first(state) if chosen else second(state))

    return step


def _least(instruction: Instruction) -> Step:
    """IMNMX, VIMNMX, VIADDMNMX: the lesser where the predicate holds, else the greater."""
    target, _, sources, predicates = _split(instruction)
    write, reads = writer(target), [reader(o) for o in sources]
    choose = truth(predicates[-1])
    unsigned, adds = ".U32" in instruction.opcode, "ADD" in instruction.base

    def step(state: State) -> None:
        values = [read(state) for read in reads]
        chosen = choose(state)
        if missing := unknown(*values, chosen):
            return write(state, missing)
        numbers = [int(v) for v in values]  # type: ignore[arg-type]
        if adds:
            numbers = [(numbers[0] + numbers[1]) & MASK, *numbers[2:]]
        if not unsigned:
            numbers = [signed(n) for n in numbers]
        return write(state, (min(numbers) if chosen else max(numbers)) & MASK)

    return step


def _permute(instruction: Instruction) -> Step:
    """PRMT: four bytes of a pair (c:a) that a selector names."""
    target, a, selector, c = instruction.operands[:4]
    write, reads = writer(target), [reader(o) for o in (a, selector, c)]
    special = "." in instruction.opcode

    def step(state: State) -> None:
        low, by, top = (read(state) for read in reads)
        if special or unknown(low, by, top):
            return write(state, unknown(low, by, top) or DATA)
        assert isinstance(low, int)
        assert isinstance(by, int)
        assert isinstance(top, int)
        pair, result = low | top << 32, 0
        for k in range(4):
            nibble = by >> 4 * k & 15
            byte = pair >> 8 * (nibble & 7) & 255
            if nibble & 8:
                byte = 255 if byte & 128 else 0
            result |= byte << 8 * k
        return write(state, result)

    return step


def _copy(instruction: Instruction) -> Step:
    """MOV, LDC and their kind: one word, or two with ``.64``, four with ``.128``; a part of a word with ``.U8``."""
    target, source = instruction.operands[:2]
    words = 4 if ".128" in instruction.opcode else 2 if ".64" in instruction.opcode else 1
    if part := re.search(r"\.([US])(8|16)\b", instruction.opcode):
        bits = int(part.group(2))

        def narrow(value: int) -> int:
            low = value & ((1 << bits) - 1)
            return signed(low, bits) if part.group(1) == "S" else low

        return _plain(narrow)(instruction)
    moves = [(writer(following(target, k)), reader(source, k)) for k in range(words)]

    def step(state: State) -> None:
        for value, (write, _) in zip([read(state) for _, read in moves], moves, strict=True):
            write(state, value)

    return step


def _special(instruction: Instruction) -> Step:
    """S2R, S2UR, CS2R: a special register."""
    target, name = instruction.operands
    words = 1 if ".32" in instruction.opcode or instruction.base != "CS2R" else 2
    writes = [writer(following(target, k)) for k in range(words)]

    def step(state: State) -> None:
        for k, write in enumerate(writes):
            write(state, 0 if name == "SRZ" or k else state.special.get(name, DATA))

    return step


def _halves(instruction: Instruction) -> Step:
    """HFMA2 on zeros, which is how a constant is made of two halves."""
    target, a, b, *rest = instruction.operands
    if a.lstrip("-") != "RZ" or b.lstrip("-") != "RZ" or len(rest) != 2:
        return _forget(instruction)
    high, low = (int(np.float16(float(o)).view(np.uint16)) for o in rest)
    write = writer(target)
    return lambda state: write(state, high << 16 | low)


def _round_up(value: float) -> int:
    rounded = np.float32(value)
    return bits_of(np.nextafter(rounded, np.float32(np.inf)) if float(rounded) < value else rounded)


def _to_float(instruction: Instruction) -> Step:
    """I2F, I2FP of 32 bits."""
    if re.search(r"F64|64|F16|BF16|[US]8|[US]16", instruction.opcode):
        return _forget(instruction)
    unsigned, up = "U32" in instruction.opcode, "RP" in instruction.opcode

    def convert(value: int) -> int:
        number = float(value if unsigned else signed(value))
        return _round_up(number) if up else bits_of(number)

    return _plain(convert)(instruction)


def _to_integer(instruction: Instruction) -> Step:
    """F2I of 32 bits, truncating."""
    if "64" in instruction.opcode or "F16" in instruction.opcode or "TRUNC" not in instruction.opcode:
        return _forget(instruction)
    least, most = (0, MASK) if "U32" in instruction.opcode else (-(1 << 31), (1 << 31) - 1)

    def convert(bits: int) -> int:
        value = float(float_of(bits))
        return 0 if value != value else int(max(float(least), min(float(most), value)))

    return _plain(convert)(instruction)


def _function(instruction: Instruction) -> Step:
    """MUFU: the reciprocal alone, of which integer divisions are made."""
    if instruction.opcode != "MUFU.RCP":
        return _forget(instruction)

    def reciprocal(bits: int) -> int:
        value = float(float_of(bits))
        return bits_of(1.0 / value) if value else bits_of(float("inf"))

    return _plain(reciprocal)(instruction)


def _absolute(value: int) -> int:
    return abs(signed(value))


def _bit_mask(at: int, length: int) -> int:
    return ((1 << min(length & MASK, 32)) - 1) << min(at & MASK, 32)


def _extended(instruction: Instruction) -> Step:
    """SGXT: the low b bits, with their sign unless ``.U32``."""
    is_unsigned = ".U32" in instruction.opcode

    def extend(value: int, bits: int) -> int:
        bits = min(bits, 32)
        low = value & ((1 << bits) - 1)
        return low if is_unsigned or not bits else signed(low, bits)

    return _plain(extend)(instruction)


def _leading(value: int) -> int:
    return value.bit_length() - 1


def _vote(instruction: Instruction) -> Step:
    """VOTE: the first thread's own vote; the threads beside it do what it does or nothing."""
    operands = list(instruction.operands)
    register = None if is_predicate(operands[0]) else operands.pop(0)
    flag, source = set_truth(operands[0]), truth(operands[-1])
    write = writer(register) if register else None

    def step(state: State) -> None:
        value = source(state)
        if write:
            write(state, value if isinstance(value, Unknown) else int(value))
        flag(state, value)

    return step


def _pack(instruction: Instruction) -> Step:
    """P2R: the predicates that a mask names as bits of a word."""
    target, kind, base, mask = instruction.operands
    if kind not in ("PR", "UPR") or ".B" in instruction.opcode:
        return _forget(instruction)
    write, before, wanted = writer(target), reader(base), reader(mask)
    letter = "UP" if kind == "UPR" else "P"

    def step(state: State) -> None:
        old, chosen = before(state), wanted(state)
        assert isinstance(chosen, int)
        flags = {k: state.predicates.get(f"{letter}{k}", DATA) for k in range(7) if chosen >> k & 1}
        value, known = bits_known(old)
        for k, flag in flags.items():
            value = value & ~(1 << k) | (flag is True) << k
            known = known & ~(1 << k) | isinstance(flag, bool) << k
        write(state, value if known == MASK else Bits(value & known, known))

    return step


def _unpack(instruction: Instruction) -> Step:
    """R2P: predicates from the bits of a word."""
    _, source, mask = instruction.operands
    shift = int(source[-1]) * 8 if re.search(r"\.B\d$", source) else 0
    read, wanted = reader(re.sub(r"\.B\d$", "", source)), int(mask, 16)

    def step(state: State) -> None:
        word = read(state)
        value, known = bits_known(word)
        for k in range(7):
            if wanted >> k & 1:
                is_known = known >> (shift + k) & 1
                state.predicates[f"P{k}"] = bool(value >> (shift + k) & 1) if is_known else unknown(word) or DATA

    return step


_ADDRESS = re.compile(r"^(?:desc\[\w+\](?:\[\w+(?:\.64)?\])?)?\[(.*)\]$")
_TERM = re.compile(r"([+-]?)(U?R\d+|U?RZ|0x[0-9a-f]+)((?:\.\w+)*)")


def address_of(operand: str) -> Read:
    """A function that reads the address of a memory operand; a register pair has ``.64``."""
    found = _ADDRESS.match(operand)
    if found is None:
        return lambda state: DATA
    terms: list[tuple[int, Read]] = []
    for sign, name, modifiers in _TERM.findall(found.group(1)):
        scale = re.search(r"\.X(\d+)", modifiers)
        factor = int(scale.group(1)) if scale else 1
        pair = ".64" in modifiers and "R" in name
        terms.append((-factor if sign == "-" else factor, _reader_of_pair(name) if pair else reader(name)))

    def read(state: State) -> Value:
        values = [value(state) for _, value in terms]
        return unknown(*values) or sum(f * v for (f, _), v in zip(terms, values, strict=True))  # type: ignore[operator]

    return read


def _words(opcode: str) -> int:
    return 4 if ".128" in opcode else 2 if ".64" in opcode else 1


def _load_shared(instruction: Instruction) -> Step:
    target, source = instruction.operands[:2]
    address, words = address_of(source), _words(instruction.opcode)
    writes = [writer(following(target.split(".")[0], k)) for k in range(words)]

    def step(state: State) -> None:
        at = address(state)
        for k, write in enumerate(writes):
            write(state, state.shared.get(at + 4 * k, DATA) if isinstance(at, int) else DATA)

    return step


def _store_shared(instruction: Instruction) -> Step:
    place, source = instruction.operands[:2]
    address, words = address_of(place), _words(instruction.opcode)
    reads = [reader(following(source.split(".")[0], k)) for k in range(words)]

    def step(state: State) -> None:
        at = address(state)
        if not isinstance(at, int):
            state.shared.clear()
        else:
            state.shared.update({at + 4 * k: read(state) for k, read in enumerate(reads)})

    return step


def _atomic(instruction: Instruction) -> Step:
    target = next(o for o in instruction.operands if not is_predicate(o))
    write = writer(target)
    return lambda state: write(state, TICKET)


def _shuffle(instruction: Instruction) -> Step:
    """SHFL: another thread's value, known only to be as unknown as one's own."""
    flag, target, source = instruction.operands[:3]
    write, read = writer(target), reader(source)
    set_flag = set_truth(flag)
    own = ".IDX" in instruction.opcode and instruction.operands[3] == "RZ"

    def step(state: State) -> None:
        value = read(state)
        write(state, value if own else unknown(value) or DATA)
        set_flag(state, DATA)

    return step


_ACCUMULATORS = re.compile(r"\.64x(\d+)x")


def width(instruction: Instruction) -> int:
    """Registers that an instruction of unknown results may write."""
    opcode, base = instruction.opcode, instruction.base
    if found := _ACCUMULATORS.search(opcode):
        return int(found.group(1)) // 2
    if (base.endswith("MMA") and base != "HFMA2") or base in ("LDSM", "LDTM"):
        return 4
    if "128" in opcode:
        return 4
    if base in ("F2F", "I2F"):
        return 2 if opcode.split(".")[1:2] == ["F64"] else 1
    wide = base in ("DADD", "DMUL", "DFMA", "DMNMX", "FFMA2", "FADD2", "FMUL2") or ".WIDE" in opcode
    return 2 if wide or (re.search(r"\.[US]?64\b", opcode) and base not in ("ISETP", "UISETP")) else 1


def _written(instruction: Instruction) -> tuple[list[str], list[str]]:
    """Registers and predicates that an instruction may write."""
    operands = list(instruction.operands)
    registers: list[str] = []
    if instruction.base in STORES:
        return [], []
    flags = [o for o in itertools.takewhile(is_predicate, operands) if not o.startswith("!")]
    del operands[: len(flags)]
    if operands and (found := _REGISTER.match(operands[0])):
        if found.group(4) != "Z":
            registers = [following(found.group(3) + found.group(4), k) for k in range(width(instruction))]
        flags += itertools.takewhile(lambda o: is_predicate(o) and not o.startswith("!"), operands[1:])
    return registers, [flag for flag in flags if not flag.endswith("T")]


def _forget(instruction: Instruction) -> Step:
    """What ``instruction`` writes is unknown."""
    registers, flags = _written(instruction)

    def step(state: State) -> None:
        state.registers.update(dict.fromkeys(registers, DATA))
        state.predicates.update(dict.fromkeys(flags, DATA))

    return step


def _nothing(instruction: Instruction) -> Step:
    return lambda state: None


STORES = ("STG", "ST", "STL", "STS", "RED", "REDG", "BAR", "BSSY", "BSYNC", "NOP", "WARPSYNC", "BREAK", "BRA")
"""What writes no register."""

STEPS: dict[str, Callable[[Instruction], Step]] = {
    **dict.fromkeys(("MOV", "UMOV", "LDC", "ULDC", "LDCU", "R2UR"), _copy),
    **dict.fromkeys(("IADD3", "UIADD3", "VIADD", "UVIADD", "IADD"), _sum),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply),
    **dict.fromkeys(("LEA", "ULEA"), _lea),
    **dict.fromkeys(("SHF", "USHF"), _shift),
    **dict.fromkeys(("LOP3", "ULOP3"), _logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _predicate_logic),
    **dict.fromkeys(("ISETP", "UISETP"), _compare),
    **dict.fromkeys(("SEL", "USEL", "FSEL", "UFSEL"), _select),
    **dict.fromkeys(("IMNMX", "UIMNMX", "VIMNMX", "UVIMNMX", "VIADDMNMX"), _least),
    **dict.fromkeys(("PRMT", "UPRMT"), _permute),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    **dict.fromkeys(("I2F", "I2FP", "UI2F", "UI2FP"), _to_float),
    **dict.fromkeys(("SGXT", "USGXT"), _extended),
    **dict.fromkeys(("IABS", "UIABS"), _plain(_absolute)),
    **dict.fromkeys(("POPC", "UPOPC"), _plain(int.bit_count)),
    **dict.fromkeys(("FLO", "UFLO"), _plain(_leading)),
    **dict.fromkeys(("BMSK", "UBMSK"), _plain(_bit_mask)),
    **dict.fromkeys(("VOTE", "VOTEU"), _vote),
    **dict.fromkeys(("ATOM", "ATOMG"), _atomic),
    **dict.fromkeys(STORES, _nothing),
    "HFMA2": _halves,
    "F2I": _to_integer,
    "MUFU": _function,
    "P2R": _pack,
    "R2P": _unpack,
    "LDS": _load_shared,
    "STS": _store_shared,
    "SHFL": _shuffle,
}
"""What makes the step of an instruction. Others write unknown values."""


def step_of(instruction: Instruction) -> Step:
    """A function that runs ``instruction`` on a state; where its guard is unknown, so are results that it changes."""
    step = STEPS.get(instruction.base, _forget)(instruction)
    if instruction.guard is None:
        return step
    guard = truth(instruction.guard)
    registers, flags = _written(instruction)

    def guarded(state: State) -> None:
        holds = guard(state)
        if holds is True:
            step(state)
        elif holds is not False:
            before = [state.registers.get(name, DATA) for name in registers]
            truths = [state.predicates.get(name, DATA) for name in flags]
            step(state)
            for name, old in zip(registers, before, strict=True):
                state.registers[name] = merged(old, state.registers.get(name, DATA))
            for name, was in zip(flags, truths, strict=True):
                if state.predicates.get(name, DATA) != was:
                    state.predicates[name] = holds

    return guarded
