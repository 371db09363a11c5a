# SPDX-License-Identifier: Apache-2.0
"""`tools/check_sass.py` parses small SASS listings and finds planted defects; nvcc and cuobjdump are not needed."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "check_sass.py"
if not SCRIPT.is_file():
    pytest.skip("not in a source tree", allow_module_level=True)

# Output of cuobjdump: the encoding of an instruction is on its line and the next.
PRINTED = """
Fatbin elf code:
================
arch = sm_90a

	code for sm_90a
	.target	sm_90a

		Function : _Z4loopPKf
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                       /* 0x00000a00ff017b82 */
                                                                                                /* 0x000fe20000000800 */
        /*0010*/              @!P1 LDG.E.128.CONSTANT R12, desc[UR4][R2.64+0x10] ;              /* 0x0000000402047981 */
                                                                                                /* 0x000ea2000c1e9900 */
        /*0020*/                   EXIT ;                                                       /* 0x000000000000794d */
                                                                                                /* 0x000fea0003800000 */
        /*0030*/                   BRA 0x30;                                                    /* 0xfffffffc00fc7947 */
                                                                                                /* 0x000fc0000383ffff */
		..........


		Function : _Z5emptyv
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   EXIT ;                                                       /* 0x000000000000794d */
"""

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _Z4loopPKf:
  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        spec = importlib.util.spec_from_file_location("check_sass", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "check_sass", module)  # dataclasses look up their module in sys.modules
        spec.loader.exec_module(module)
        yield module


def listing(text: str) -> str:
    """Format code as cuobjdump does, with addresses in place of labels such as `loop:`."""
    lines = [line.strip() for line in text.strip().splitlines()]
    labels, count = {}, 0
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = f"{16 * count:#x}"
        else:
            count += 1
    code = [line for line in lines if not line.endswith(":")]
    for name, address in labels.items():
        code = [line.replace(f" {name}", f" {address}") for line in code]
    return "\n".join(f"        /*{16 * number:04x}*/ {line} ;  /* 0x0 */" for number, line in enumerate(code))


def kernel(tool, text: str, **resources):
    (code,) = tool.parse(f"\t\tFunction : f\n{listing(text)}").values()
    return tool.Kernel("f", code, **resources)


def faults(tool, text: str, resources: dict | None = None, **limits) -> list[str]:
    return tool.Facts(kernel(tool, text, **(resources or {}))).faults(tool.Limit("f", "a reason", **limits))


def test_parse(tool):
    functions = tool.parse(PRINTED)
    assert list(functions) == ["_Z4loopPKf", "_Z5emptyv"]
    load, *_ = functions["_Z4loopPKf"][1:]
    assert (load.address, load.guard, load.opcode) == (0x10, "!P1", "LDG.E.128.CONSTANT")
    assert load.operands == ["R12", "desc[UR4][R2.64+0x10]"]
    assert [instruction.base for instruction in functions["_Z4loopPKf"]] == ["LDC", "LDG", "EXIT", "BRA"]
    assert tool.parse_resources(RESOURCES) == {"_Z4loopPKf": (40, 16)}


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_short_names(tool):
    symbols = [
        "_ZN11spatialflow49_GLOBAL__N__f7694ad4_16_deform_conv2d_cu_06e65de2"
        "20deform_conv2d_kernelI13__nv_bfloat16Li64ELi8EE"
        "EvNS_13DeformProblemIT_EEPKS4_S7_PS4_",
        "_Z5plainPf",
    ]
    assert tool.short_names(symbols) == ["deform_conv2d_kernel<bf16, 64, 8>", "plain"]


def span(first, last):
    return set(range(first, last + 1))


@pytest.mark.parametrize(
    "text, written, read",
    [
        ("LDG.E.128 R12, desc[UR4][R2.64+0x10]", span(12, 15), {2, 3}),
        ("LDG.E.U16.CONSTANT R12, desc[UR4][R2.64]", {12}, {2, 3}),
        ("LDS.64 R8, [R4+UR6+0x80]", {8, 9}, {4}),
        ("LDSM.16.MT88.4 R8, [R4]", span(8, 11), {4}),
        ("STG.E.128 desc[UR4][R2.64], R12", set(), {2, 3} | span(12, 15)),
        ("LDGSTS.E.BYPASS.128 [R9+0x400], desc[UR4][R2.64], !P0", set(), {2, 3, 9}),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R12", set(), {2, 3} | span(12, 15)),
        ("HMMA.16816.F32.BF16 R24, R4, R8, R24", span(24, 27), span(4, 9) | span(24, 27)),
        ("HMMA.16816.F16 R24, R4, R8, RZ", {24, 25}, span(4, 9)),
        ("HMMA.1688.F32 R24, R4, R8, R24", span(24, 27), {4, 5, 8} | span(24, 27)),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, !UPT, gsb0", span(24, 87), span(24, 87)),
        ("DFMA R4, R6, R8, R10", {4, 5}, span(6, 11)),
        ("IMAD.WIDE.U32 R4, P0, R6, R7, R8", {4, 5}, span(6, 9)),
        ("I2F.F64.S64 R4, R6", {4, 5}, {6, 7}),
        ("I2F.S64 R4, R6", {4}, {6, 7}),
        ("F2I.S64.TRUNC R4, R6", {4, 5}, {6}),
        ("F2F.F32.F64 R4, R6", {4}, {6, 7}),
        ("ISETP.GE.AND P0, PT, R2, R3, PT", set(), {2, 3}),
        ("SHFL.BFLY PT, R5, R4, 0x1, 0x1f", {5}, {4}),
        ("R2UR UR4, R2", set(), {2}),
        ("CS2R R12, SRZ", {12, 13}, set()),
        ("PRMT R68, R20.reuse, 0x7632, R69", {68}, {20, 69}),
        ("FADD R4, |R5|, -R6", {4}, {5, 6}),
        ("ATOMG.E.ADD.STRONG.GPU PT, R4, desc[UR4][R2.64], R5", {4}, {2, 3, 5}),
    ],
)
def test_registers(tool, text, written, read):
    (instruction,) = kernel(tool, text).code
    assert (set(instruction.written), set(instruction.read)) == (written, read)


@pytest.mark.parametrize(
    "opcode, size",
    [
        ("LDG.E", 4),
        ("LDG.E.U8.CONSTANT", 1),
        ("STG.E.64", 8),
        ("LDGSTS.E.BYPASS.128", 16),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU", 16),
        ("REDG.E.ADD.F64.RN.STRONG.GPU", 8),
        ("UTMALDG.5D", 16),
    ],
)
def test_access_bytes(tool, opcode, size):
    assert tool.access_bytes(opcode) == size


NESTED = """
    MOV R1, c[0x0][0x28]
outer:
    LDG.E R2, desc[UR4][R8.64]
middle:
    HMMA.16816.F32.BF16 R24, R4, R12, R24
    HMMA.16816.F32.BF16 R24, R4, R12, R24
    BRA.DIV UR6, apart
back:
    @P3 BRA inner
inner:
    FADD R3, R3, R3
    @P0 BRA inner
    @P1 BRA middle
    FADD R2, R2, R2
    @P2 BRA outer
    EXIT
apart:
    SHFL.BFLY PT, R5, R4, 0x1, 0x1f
    BRA back
end:
    BRA end
"""


def test_main_loop_is_the_innermost_with_matrix_instructions(tool):
    """The main loop includes inner loops without matrix instructions, but not code for diverged warps or padding."""
    nested = kernel(tool, NESTED)
    assert sorted(len(nested.positions(body)) for body in nested.loops()) == [2, 7, 10]
    assert nested.main_loops() == [list(range(2, 9))]
    assert nested.outer_loops() == [list(range(1, 11))]
    facts = tool.Facts(nested)
    assert facts.per_matrix == 3.5
    assert facts.scope == "loop around"
    assert [(load.distance, load.matrix) for load in facts.loads] == [(8, 2)]


def loads_of(tool, text):
    return [(load.distance, load.matrix) for load in tool.Facts(kernel(tool, text)).loads]


def test_a_prefetch_is_read_after_the_products(tool):
    text = """
    loop:
        LDG.E.128 R12, desc[UR4][R2.64]
        HMMA.16816.F32.BF16 R24, R4, R8, R24
        HMMA.16816.F32.BF16 R28, R4, R10, R28
        STS.128 [R20], R12
        @P0 BRA loop
        EXIT
    """
    assert loads_of(tool, text) == [(3, 2)]


def test_a_load_may_be_read_in_the_next_iteration(tool):
    text = """
    loop:
        STS.128 [R20], R12
        HMMA.16816.F32.BF16 R24, R4, R8, R24
        LDG.E.128 R12, desc[UR4][R2.64]
        HMMA.16816.F32.BF16 R28, R4, R10, R28
        @P0 BRA loop
        EXIT
    """
    assert loads_of(tool, text) == [(3, 1)]


def test_any_register_of_a_vector_load_counts(tool):
    text = """
    loop:
        LDG.E.128 R12, desc[UR4][R2.64]
        FADD R16, R11, R11
        FADD R17, R15, R15
        FADD R18, R12, R12
        @P0 BRA loop
        EXIT
    """
    assert loads_of(tool, text) == [(2, 0)]


def test_an_overwritten_register_is_not_read(tool):
    text = """
    loop:
        LDG.E R12, desc[UR4][R2.64]
        {guard}MOV R12, RZ
        FADD R18, R12, R12
        @P0 BRA loop
        EXIT
    """
    assert loads_of(tool, text.format(guard="")) == []
    assert loads_of(tool, text.format(guard="@P1 ")) == [(2, 0)]


def test_the_shortest_path_counts(tool):
    text = """
    loop:
        LDG.E R12, desc[UR4][R2.64]
        @P1 BRA late
        FADD R1, R1, R1
        FADD R1, R1, R1
        FADD R1, R1, R1
    late:
        FADD R18, R12, R12
        @P0 BRA loop
        EXIT
    """
    assert loads_of(tool, text) == [(2, 0)]


def test_the_path_of_idle_warps_does_not_count(tool):
    """A warp without outputs jumps over the products."""
    text = """
    loop:
        LDG.E.128 R12, desc[UR4][R2.64]
        @P1 BRA idle
        HMMA.16816.F32.BF16 R24, R4, R8, R24
        HMMA.16816.F32.BF16 R28, R4, R10, R28
    idle:
        STS.128 [R20], R12
        @P1 BRA next
        HMMA.16816.F32.BF16 R24, R4, R8, R24
    next:
        @P0 BRA loop
        EXIT
    """
    assert loads_of(tool, text) == [(4, 2)]


def test_conditions_of_jumps(tool):
    """The condition of a jump is a guard or an operand; a jump whose guard is always false is ignored."""
    text = """
        LDG.E R12, desc[UR4][R2.64]
        {jump} near
        FADD R1, R1, R1
        FADD R18, R12, R12
        EXIT
    near:
        FADD R18, R12, R12
        EXIT
    """
    jumps = {"BRA": {5: 2}, "@PT BRA": {5: 2}, "@!PT BRA": {3: 3}, "@P0 BRA": {3: 3, 5: 2}, "BRA P0,": {3: 3, 5: 2}}
    for jump, readers in jumps.items():
        assert kernel(tool, text.format(jump=jump)).first_readers(0, []) == readers, jump


def test_other_products_are_another_path(tool):
    text = """
    loop:
        LDG.E.128 R12, desc[UR4][R2.64]
        @P1 BRA other
        HMMA.16816.F32.BF16 R24, R4, R8, R24
        STS.128 [R20], R12
        BRA next
    other:
        STS.128 [R20], R12
        HMMA.16816.F32.BF16 R24, R4, R9, R24
    next:
        @P0 BRA loop
        EXIT
    """
    assert [distance for distance, _ in loads_of(tool, text)] == [2]


def test_a_load_at_the_end_of_a_block(tool):
    text = """
        LDG.E R12, desc[UR4][R2.64]
    loop:
        FADD R18, R12, R12
        LDG.E R12, desc[UR4][R2.64]
        @P0 BRA loop
        EXIT
    """
    assert loads_of(tool, text) == [(2, 0)]
    assert loads_of(tool, "LDG.E R12, desc[UR4][R2.64]\n@P0 BRA next\nnext:\nFADD R1, R12, R1\nEXIT") == [(2, 0)]


GOOD = """
loop:
    LDG.E.128 R12, desc[UR4][R2.64]
    LDG.E.128 R16, desc[UR4][R4.64]
    HMMA.16816.F32.BF16 R24, R32, R8, R24
    HMMA.16816.F32.BF16 R28, R32, R10, R28
    STS.128 [R20], R12
    STS.128 [R20+0x10], R16
    @P0 BRA loop
    STG.E.128 desc[UR4][R2.64], R24
    EXIT
"""
LIMITS = dict(load=16, narrow=0, store=16, distance=4, matrix=2, in_flight=2, per_matrix=3.5, registers=40)


def test_clean_code(tool):
    assert faults(tool, GOOD, {"registers": 40}, **LIMITS) == []


@pytest.mark.parametrize(
    "old, new, resources, expected_messages",
    [
        # The next instruction reads the result of the first load.
        (
            "    LDG.E.128 R16",
            "    PRMT R21, R12, 0x7632, R21\n    LDG.E.128 R16",
            {},
            ["1 of 2 loads with a distance below 4: LDG", "1 of 2 loads with less than 2", "1 loads in flight", "4.0"],
        ),
        ("    STS.128 [R20], R", "    LDL R6, [R1]\n    STS.128 [R20], R", {}, ["1 accesses to local", "4.0 instr"]),
        ("    STG.E.128", "    STL.64 [R1+0x8], R12\n    STG.E.128", {}, ["1 accesses to local memory"]),
        ("EXIT", "EXIT", {"stack": 16}, ["16 bytes of stack"]),
        ("EXIT", "EXIT", {"registers": 41}, ["41 registers, more than 40"]),
        ("EXIT", "BRX R4 -0x40", {}, ["indirect branch"]),
        (
            "LDG.E.128 R16, desc[UR4][R4.64]",
            "LDG.E R16, desc[UR4][R4.64]",
            {},
            ["1 loads below 16 bytes in the main loop, more than 0: LDG.E at 0x10", "1 loads in flight"],
        ),
        ("LDG.E.128", "LDG.E", {}, ["widest global load 4 bytes, less than 16", "2 loads below 16 bytes"]),
        ("STG.E.128", "STG.E.64", {}, ["widest global store 8 bytes, less than 16"]),
        ("HMMA.16816.F32.BF16", "FFMA", {}, ["no loop with matrix instructions", "2 of 2 loads with less than 2 HMMA"]),
    ],
)
def test_planted_faults(tool, old, new, resources, expected_messages):
    assert old in GOOD
    messages = faults(tool, GOOD.replace(old, new), resources, **LIMITS)
    assert len(messages) == len(expected_messages), messages
    assert all(any(words in fault for fault in messages) for words in expected_messages), messages


def test_every_kernel_has_a_row(tool, monkeypatch):
    (code,) = tool.parse(f"\t\tFunction : f\n{listing(GOOD)}").values()
    kernels = [tool.Kernel("copy_kernel<bf16, 8>", code), tool.Kernel("other_kernel", code)]
    rows = (tool.Limit("copy_kernel<*, 8>", "wide", load=16, distance=9), tool.Limit("gone_kernel", "renamed"))
    monkeypatch.setattr(tool, "LIMITS", rows)
    assert tool.check(kernels) == [
        "copy_kernel<bf16, 8>: 2 of 2 loads with a distance below 9: LDG.E.128 at 0x0, read by STS.128 at 0x40:"
        " distance 4, 2 HMMA; LDG.E.128 at 0x10, read by STS.128 at 0x50: distance 4, 2 HMMA (wide)",
        "other_kernel: no row in tools/sass_limits.py",
        "gone_kernel: no such kernel",
    ]
    assert len(tool.check(kernels, whole=False)) == 2


def test_table(tool, monkeypatch):
    monkeypatch.setattr(tool, "LIMITS", (tool.Limit("copy_kernel<*, 8>", "wide"), tool.Limit("*", "the others")))
    copies = [tool.Kernel(f"copy_kernel<{name}, 8>", kernel(tool, GOOD).code, 40) for name in ("bf16", "half")]
    head, rule, *rows = tool.table([*copies, kernel(tool, "EXIT")]).splitlines()
    assert head.count("|") == rule.count("|") == rows[0].count("|") == rows[1].count("|")
    assert rows == [
        "| `copy_kernel<*, 8>` | 2 | 40 | 9 | 2 | 3.5 | 2 | 4 | 4 | 2 | 2 | 16, 16 |",
        "| `f` | 1 | 0 | 1 | 0 |  | 0, no loop |  |  |  |  | 0, 0 |",
    ]


def test_rows_say_why(tool):
    assert all(limit.why for limit in tool.LIMITS)
    assert len({limit.kernel for limit in tool.LIMITS}) == len(tool.LIMITS)


def test_a_kernel_that_the_device_does_not_know(tool):
    """The host's mangled name has an extra L; if it also has an r for a restrict argument, no kernel matches it."""
    known = b"_ZN3lib12_GLOBAL__N_1L11sort_kernelIfEEvPT_ _ZN3lib12_GLOBAL__N_111sort_kernelIfEEvPT_"
    fault = b"_ZN3lib12_GLOBAL__N_1L11sort_kernelIrPKfEEvT_ _ZN3lib12_GLOBAL__N_111sort_kernelIPKfEEvT_"
    assert tool.unlaunchable(known) == []
    assert tool.unlaunchable(known.replace(b" ", b"\x00data")) == []
    stub = b"_ZL36__device_stub_" + known.split()[1]
    assert tool.unlaunchable(known.split()[0] + b" " + stub) == [known.split()[0].decode()]
    assert tool.unlaunchable(known + b" " + fault) == ["_ZN3lib12_GLOBAL__N_1L11sort_kernelIrPKfEEvT_"]
