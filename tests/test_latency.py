"""The latency model on hand-written machine code whose answers are known."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import roofline
from benchmarks.latency import launches, model, table, walk
from benchmarks.latency.sass import Unreadable, parse
from benchmarks.latency.values import DATA, Bits, State, step_of
from benchmarks.roofline import EVERY_SHAPE, OPERATORS
from codmd.kernels.whole.together import DOTS_OF_EIGHT

PARAMETERS = 0x210


def code(*lines):
    """A kernel from lines ``label:`` and ``[@guard] instruction ; stall [set=k] [read=k] [wait=mask]``."""
    text = ['.section .text.kernel,"ax",@progbits']
    address = 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
            continue
        instruction, _, control = line.partition(";")
        stall, *rest = control.split() or ["1"]
        given = {"set": 7, "read": 7, "wait": 0} | {k: int(v) for k, v in (part.split("=") for part in rest)}
        bits = int(stall) | given["set"] << 5 | given["read"] << 8 | given["wait"] << 11
        text.append(f"/*{address:04x}*/ {instruction.strip()} ; /* 0x{0:016x} */")
        text.append(f"    /* 0x{bits << 41:016x} */")
        address += 16
    return parse(text)["kernel"]


def program(*parameters, last=False, warps=4, uncached=()):
    constants = bytes(PARAMETERS) + struct.pack(f"<{len(parameters)}I", *parameters)
    return walk.Program({0: constants}, {"SR_TID.X": 0, "SR_CTAID.X": 5}, warps, uncached, last)


def run(*lines, **options):
    parameters = options.pop("parameters", ())
    asked = program(*parameters, **options)
    return walk.Kernel(code(*lines), asked.warps).walk(asked)


LOAD = "LDG.E R{0}, desc[UR4][R{1}.64] ; 1 set={2} wait={3}"
POINTERS = "MOV R2, 0x1000 ; 4", "MOV R3, RZ ; 4", "MOV R4, 0x2000 ; 4", "MOV R5, RZ ; 4"


def test_a_chain_takes_the_sum_of_its_stalls():
    found = run("MOV R0, 0x1 ; 4", "IADD3 R0, R0, 0x1, RZ ; 5", "FADD R1, R0, R0 ; 4", "EXIT ; 5")
    assert (found.cycles, found.instructions, found.barriers, found.loads) == (18, 4, 0, 0)


def test_independent_loads_wait_once_and_dependent_ones_twice():
    both = run(*POINTERS, LOAD.format(6, 2, 0, 0), LOAD.format(7, 4, 1, 0), "FADD R8, R6, R7 ; 4 wait=3", "EXIT ; 1")
    assert both.cycles == 16 + 1 + walk.L2 + 4 + 1
    assert (both.loads, both.dependent_loads) == (2, 1)
    chain = run(
        *POINTERS, LOAD.format(6, 2, 0, 0), "IADD3 R4, R6, R4, RZ ; 4 wait=1", LOAD.format(7, 4, 1, 0),
        "FADD R8, R7, R7 ; 4 wait=2", "EXIT ; 1",
    )  # fmt: skip
    assert chain.cycles == 16 + walk.L2 + 4 + walk.L2 + 4 + 1
    assert (chain.loads, chain.dependent_loads) == (2, 2)


def test_a_line_is_near_once_it_was_loaded_and_latents_never_are():
    again = LOAD.format(6, 2, 0, 0), "FADD R8, R6, R6 ; 4 wait=1"
    assert run(*POINTERS, *again, *again, "EXIT ; 1").cycles == 16 + walk.L2 + walk.L1 + 8 + 1
    latents = ((0x1000, 0x1004),)
    assert run(*POINTERS, *again, *again, "EXIT ; 1", uncached=latents).cycles == 16 + 2 * walk.DRAM + 8 + 1
    dropped = run(*POINTERS, *again, "CCTL.IVALL ; 2", *again, "EXIT ; 1")
    assert dropped.cycles == 16 + 2 * walk.L2 + 8 + 2 + 1


LOOP = (
    "MOV R0, RZ ; 4", ".L_0:", "FADD R9, R9, R8 ; 4", "IADD3 R0, R0, 0x2, RZ ; 4",
    "ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT ; 13", "@!P0 BRA `(.L_0) ; 5", "EXIT ; 1",
)  # fmt: skip


@pytest.mark.parametrize("count, trips", [(1, 1), (2, 1), (7, 4), (48, 24)])
def test_trips_follow_from_the_parameters_of_the_launch(count, trips):
    found = run(*LOOP, parameters=[count])
    assert found.instructions == 2 + 4 * trips
    assert found.cycles == 4 + 26 * trips + 1


def test_nested_loops_multiply():
    inner = (*LOOP[1:-1],)
    lines = (
        "MOV R1, RZ ; 4", ".L_1:", LOOP[0], *inner, "VIADD R1, R1, 0x1 ; 4",
        "ISETP.NE.AND P1, PT, R1, c[0x0][0x214], PT ; 13", "@P1 BRA `(.L_1) ; 5", "EXIT ; 1",
    )  # fmt: skip
    assert run(*lines, parameters=[6, 5]).instructions == 2 + 5 * (4 + 4 * 3)


def test_a_loop_whose_trips_data_decides_is_an_error():
    load = *POINTERS, LOAD.format(10, 2, 0, 0)
    lines = [line.replace("c[0x0][0x210]", "R10") for line in LOOP]
    with pytest.raises(walk.DataDecides, match=r"data decides the trips of the loop at 0x90"):
        run(*load, *lines)


def test_a_loop_without_end_is_an_error(monkeypatch):
    monkeypatch.setattr(walk, "MOST_STEPS", 1000)
    with pytest.raises(walk.DataDecides, match="no end after 1000 instructions"):
        run(".L_0:", "NOP ; 1", "BRA `(.L_0) ; 5")


def test_barriers_and_fences_hold_the_warp():
    found = run("BAR.SYNC.DEFER_BLOCKING 0x0 ; 5", "MEMBAR.ALL.GPU ; 1", "BAR.SYNC.DEFER_BLOCKING 0x0 ; 5", "EXIT ; 1")
    assert found.cycles == 2 * (5 + walk.BARRIER) + 1 + walk.FENCE + 1
    assert found.barriers == 2


@pytest.mark.parametrize("warps, cycles", [(1, 4), (4, 4), (8, 8), (16, 16)])
def test_warps_that_share_a_scheduler_take_turns(warps, cycles):
    assert run("MOV R0, R1 ; 1", "MOV R2, R3 ; 1", "MOV R4, R5 ; 1", "EXIT ; 1", warps=warps).cycles == cycles


TICKET = (
    "MOV R2, c[0x0][0x210] ; 4", "MOV R3, RZ ; 4", "S2R R0, SR_TID.X ; 1 set=1",
    "ISETP.NE.AND P0, PT, R0, RZ, PT ; 13 wait=2",
    "@!P0 ATOMG.E.ADD.STRONG.GPU PT, R7, desc[UR4][R2.64], R7 ; 1 set=0", "@!P0 STS [0x400], R7 ; 1 wait=1",
    "BAR.SYNC.DEFER_BLOCKING 0x0 ; 5", "LDS R8, [0x400] ; 1 set=0", "ISETP.NE.AND P1, PT, R8, 0x53f, PT ; 13 wait=1",
    "@P1 EXIT ; 5", "FADD R9, R9, R9 ; 4", "EXIT ; 1",
)  # fmt: skip


def test_the_block_with_the_last_ticket_alone_goes_on():
    plain, last = (run(*TICKET, parameters=[0x1000], last=last) for last in (False, True))
    assert (plain.instructions, last.instructions) == (10, 12)
    assert last.cycles - plain.cycles == 4 + 1
    assert plain.waited["ATOMG"] == walk.LATENCIES["ATOMG"] - 1


@pytest.mark.parametrize("guard, operand, instructions", [(7, 7, 4), (7, 6, 5), (6, 7, 5)])
def test_an_exit_with_a_predicate_operand_needs_both_predicates(guard, operand, instructions):
    found = run(
        f"ISETP.EQ.AND P0, PT, RZ, {hex(7 - guard)}, PT ; 4", f"ISETP.EQ.AND P1, PT, RZ, {hex(7 - operand)}, PT ; 4",
        "MOV R0, 0x1 ; 4", "@P0 EXIT P1 ; 5", "EXIT ; 5",
    )  # fmt: skip
    assert found.instructions == instructions


def test_the_helper_of_a_division_is_passed_by_and_else_the_longer_side_is_walked():
    guarded = (
        "FCHK P0, R1, R2 ; 1 set=0", "@!P0 BRA `(.L_0) ; 5 wait=1", "MOV R4, 0x50 ; 4", "CALL.REL.NOINC `(helper) ; 5",
        ".L_0:", "FADD R1, R1, R1 ; 4", "EXIT ; 1", "helper:", "FADD R1, R1, R1 ; 4", "RET.REL.NODEC R4 `(kernel) ; 5",
    )  # fmt: skip
    assert run(*guarded).instructions == 4
    sides = (
        "FSETP.GT.AND P0, PT, R1, RZ, PT ; 13", "@P0 BRA `(.L_1) ; 5", "FADD R1, R1, R1 ; 4", "BRA `(.L_2) ; 5",
        ".L_1:", *["FADD R1, R1, R1 ; 4"] * 3, ".L_2:", "EXIT ; 1",
    )  # fmt: skip
    assert run(*sides).instructions == 6


def test_a_call_that_the_launch_decides_returns():
    lines = (
        "CALL.REL.NOINC `(helper) ; 5", "EXIT ; 1", "helper:", "FADD R1, R1, R1 ; 4", "RET.REL.NODEC R4 `(kernel) ; 5"
    )  # fmt: skip
    assert run(*lines).instructions == 4


def test_an_instruction_of_unknown_latency_is_an_error():
    with pytest.raises(Unreadable, match=r"no latency is known for NEW\.THING"):
        run("NEW.THING R0, R1 ; 1 set=0", "EXIT ; 1")
    with pytest.raises(Unreadable, match="no such comparison"):
        run("ISETP.NEAR.AND P0, PT, R0, RZ, PT ; 1", "EXIT ; 1")


def after(*lines, parameters=()):
    """The state after straight-line code."""
    asked = program(*parameters)
    state = State(asked.constants, asked.special, False)
    for instruction in code(*lines).instructions:
        step_of(instruction)(state)
    return state


@pytest.mark.parametrize("a, b", [(1343, 64), (7, 7), (0, 3), (99839, 780), (2**31 - 1, 13), (5, 2**20 + 1)])
def test_a_compiled_integer_division_divides(a, b):
    quotient = after(
        "I2F.U32.RP R0, c[0x0][0x214]", "MUFU.RCP R0, R0", "IADD3 R2, R0, 0xffffffe, RZ",
        "F2I.FTZ.U32.TRUNC.NTZ R3, R2", "IADD3 R5, RZ, -R3, RZ", "IMAD R5, R5, c[0x0][0x214], RZ", "MOV R2, RZ",
        "IMAD.HI.U32 R3, R3, R5, R2", "IMAD.HI.U32 R3, R3, c[0x0][0x210], RZ", "IADD3 R5, -R3, RZ, RZ",
        "IMAD R5, R5, c[0x0][0x214], c[0x0][0x210]", "ISETP.GE.U32.AND P0, PT, R5, c[0x0][0x214], PT",
        "@P0 IADD3 R5, R5, -c[0x0][0x214], RZ", "@P0 VIADD R3, R3, 0x1",
        "ISETP.GE.U32.AND P0, PT, R5, c[0x0][0x214], PT", "@P0 VIADD R3, R3, 0x1",
        parameters=[a, b],
    ).registers["R3"]  # fmt: skip
    assert quotient == a // b


def test_addresses_carry_into_their_upper_half():
    state = after(
        "MOV R0, 0xfffffff0", "MOV R1, 0x1", "MOV R4, 0x5", "MOV R5, RZ", "LEA R2, P0, R4, R0, 0x2",
        "LEA.HI.X.SX32 R3, R4, R1, 0x2, P0", "IADD3 R6, P1, -R4, R4, RZ", "IADD3.X R7, RZ, RZ, RZ, P1, !PT",
        "LEA R12, P2, R4, -R5, 0x3", "IADD3.X R13, RZ, -0x1, RZ, P2, !PT", "LEA R14, P3, R4, -R4, 0x1",
        "IMAD.WIDE R8, R4, -0x8, R2", "SHF.L.U64.HI R10, R0, 0x4, R1", "SHF.R.S32.HI R11, RZ, 0x1f, R0",
    )  # fmt: skip
    whole = {k: state.registers[f"R{k}"] for k in (2, 3, 6, 7, 8, 9, 10, 11)}
    assert whole[3] << 32 | whole[2] == 0x1FFFFFFF0 + 20
    assert (whole[6], whole[7]) == (0, 1)
    assert [state.registers[f"R{k}"] for k in (12, 13, 14)] == [40, 0, 5]
    assert whole[9] << 32 | whole[8] == 0x1FFFFFFF0 + 20 - 40
    assert whole[10] == 0x1FFFFFFF00 >> 32
    assert whole[11] == 0xFFFFFFFF


def test_a_part_of_a_parameter_is_read_with_its_sign():
    state = after(
        "ULDC.U8 UR4, c[0x0][0x211]", "LDC.S8 R4, c[0x0][0x212]", "LDC.U16 R5, c[0x0][0x211]",
        parameters=[0x00FE7F01, 0x00000000],
    ).registers  # fmt: skip
    assert (state["UR4"], state["R4"], state["R5"]) == (0x7F, 0xFFFFFFFE, 0xFE7F)
    whole = launches.bank(launches.LAYOUTS["sm_90"], 32, 1, bytes([0, 0, 7]))
    last = State({0: whole}, {}, False)
    step_of(code("LDC.U8 R0, c[0x0][0x212]").instructions[0])(last)
    assert last.registers["R0"] == 7


def test_a_predicate_kept_in_a_word_survives_unknown_ones_beside_it():
    state = after(
        "MOV R6, RZ", "FSETP.GT.AND P4, PT, R1, RZ, PT", "ISETP.EQ.AND P2, PT, RZ, RZ, PT",
        "@P4 LOP3.LUT R6, R6, 0x800000, RZ, 0xfc, !PT", "@P2 LOP3.LUT R6, R6, 0x8000, RZ, 0xfc, !PT",
        "LOP3.LUT P0, RZ, R6, 0x8000, RZ, 0xc0, !PT", "LOP3.LUT P1, RZ, R6, 0x4000, RZ, 0xc0, !PT",
        "LOP3.LUT P3, RZ, R6, 0x800000, RZ, 0xc0, !PT", "P2R R7, PR, RZ, 0x5", "R2P PR, R7, 0x1",
    )  # fmt: skip
    assert state.registers["R6"] == Bits(0x8000, 0xFFFFFFFF - 0x800000)
    assert state.registers["R7"] == 5
    assert [state.predicates[p] for p in ("P0", "P1", "P3")] == [True, False, DATA]


def test_tensor_core_results_arrive_late():
    found = run("HMMA.16816.F32 R4, R8, R12, R4 ; 1", "FADD R20, R6, R6 ; 4", "EXIT ; 1")
    assert found.cycles == walk.MMA + 4 + 1


def test_blocks_of_a_multiprocessor_are_bounded_by_registers_warps_and_shared_memory():
    def held(registers, warps, shared):
        return model.resident(launches.Launched("k", code(), 1, warps, registers, shared, b"", (), 0))

    assert [held(128, 4, 0), held(32, 4, 0), held(32, 8, 0), held(40, 4, 100 * 1024)] == [4, 16, 8, 2]


def test_a_compiled_kernel_is_walked_from_its_launch(monkeypatch):
    monkeypatch.setitem(OPERATORS, "gradient", lambda shape: OPERATORS["relation_loss"](shape)[1:])
    shape = (2, 3, 4, 60, 104)
    (launched,) = launches.triton_launches("gradient", shape, "sm_90")
    assert launched.moved >= 2 * 3 * 4 * 60 * 104 * 2
    found = model.model(launched, 3.35e12)
    assert (found.kernel, found.grid, found.tail, found.barriers) == ("gradient_kernel", launched.grid, 0, 0)
    assert 100 < found.instructions < 2000
    assert found.program > found.instructions
    row = model.summary("gradient", "small", "triton", "sm_90", [found], 1.0)
    assert row["estimated_us"] == found.estimated_us > model.BOUNDARY_US
    with_measurement, without = table.lines(row, 2 * found.estimated_us)[-1], table.lines(row, None)[-1]
    assert "-50 %" in with_measurement
    assert "%" not in without


def test_the_measured_column_is_that_of_the_backend():
    results = {"timings": [{"op": "dmd_loss", "shape": "wan-480p", "triton_ms": 0.5}]}
    row = {"op": "dmd_loss", "shape": "wan-480p", "backend": "triton"}
    assert table.measured_us(results, row) == 500
    assert table.measured_us(results, row | {"backend": "cuda"}) is None
    assert table.measured_us(results, row | {"shape": "wan-720p"}) is None
    assert "wan-720p" in EVERY_SHAPE


ROOT = Path(__file__).parent.parent


def docs_row(op, shape, us):
    launches_of_row = [{"tail": tail} for tail in (0.0, us)]
    return {"op": op, "shape": shape, "backend": "triton", "arch": "sm_90", "estimated_us": us, "modelled_cycles": 7,
            "launches": launches_of_row}  # fmt: skip


def test_the_columns_of_the_performance_page_keep_the_rows_that_were_not_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "MODELLED", tmp_path / "modelled.json")
    monkeypatch.setattr(table, "write_page", lambda: None)
    monkeypatch.setattr(table, "lines", lambda row, measured: [])
    for us in (1.0, 2.0):
        monkeypatch.setattr(table, "rows", lambda cases, us=us: [docs_row(*case[:2], us) for case in cases])
        asked = "dmd_loss, wan-480p," if us > 1 else "dmd_loss, wan-"
        monkeypatch.setattr("sys.argv", ["latency", "--table", "docs", "--only", asked, "--backend", "triton"])
        assert table.main() == 0
    found = json.loads((tmp_path / "modelled.json").read_text())
    assert found["dmd_loss, wan-480p, triton"] == {"estimated_us": 2.0, "modelled_cycles": 7, "tail_cycles": 2}
    assert found["dmd_loss, wan-720p, triton"]["estimated_us"] == 1.0
    column = [line.split("|")[8].strip() for line in roofline.table(roofline.rows(), None, found).splitlines()]
    assert column[0] == "Triton us (modelled)"
    assert {"2.0", "1.0", ""} <= set(column)


@pytest.mark.skipif(not DOTS_OF_EIGHT, reason="the page's code is that of a Triton with small dots")
@pytest.mark.parametrize("op", ["dmd_loss", "relation_loss"])
def test_the_modelled_columns_of_the_performance_page_are_those_of_the_kernels(op):
    (kept,) = table.kept([table.row(op, "wan-480p", "triton", "sm_90")]).items()
    name, found = kept
    written = json.loads((ROOT / table.MODELLED).read_text()).get(name)
    assert written == found, "python -m benchmarks.latency --table docs writes them again"
