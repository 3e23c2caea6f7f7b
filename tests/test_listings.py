"""The reader of generated code finds what is missing in it; `make compile` asks it about every kernel that waits."""

import pytest

from bench.listings import AMDGCN, PTX, violations

# A program that stores and arrives, then waits and loads, as the compilers write it.
NVIDIA = """
	st.global.b32 [ %rd1 + 0 ], %r1;
	bar.sync 	0;
	@%p1 atom.global.gpu.acq_rel.add.u32 %r2, [ %rd2 + 0 ], 1;
$L__BB0_1:
	@%p1 ld.global.gpu.acquire.b32 %r3, [ %rd2 + 0 ];
	bar.sync 	0;   // broadcast
	setp.ge.s32 	%p2, %r3, %r4;
	@%p2 bra 	$L__BB0_3;
$L__BB0_2:
	@%p1 ld.global.gpu.relaxed.b32 %r3, [ %rd2 + 0 ];
	bar.sync 	0;
	setp.lt.s32 	%p3, %r3, %r4;
	@%p3 bra 	$L__BB0_2;
	bra.uni 	$L__BB0_1;
$L__BB0_3:
	ld.global.b32 %r5, [ %rd1 + 0 ];
	ret;
"""
AMD = """
	global_store_dword v0, v1, s[0:1]
	;;#ASMSTART
	s_waitcnt vmcnt(0)
	v_mov_b32 v2, v3
	;;#ASMEND
	s_barrier
	s_and_saveexec_b64 s[2:3], vcc
	s_cbranch_execz .LBB0_1
	buffer_wbl2 sc1
	s_waitcnt vmcnt(0)
	global_atomic_add v3, v3, v4, s[6:7] sc0
	s_waitcnt vmcnt(0)
	buffer_inv sc1
.LBB0_1:
	s_endpgm
"""
ACQUIRE = "@%p1 ld.global.gpu.acquire.b32 %r3, [ %rd2 + 0 ];"


def test_what_is_right():
    assert violations(NVIDIA, PTX) == []
    assert violations(AMD, AMDGCN) == []


def test_a_flag_of_amd_code_tells_which_branch_is_taken():
    """The compiler joins branches and lets a flag tell the arrival of one from the way of the other around it."""
    joined = """
	s_cbranch_scc0 .LBB0_1
	global_store_dword v0, v1, s[0:1]
	s_mov_b64 s[4:5], FLAG
	s_branch .LBB0_2
.LBB0_1:
	s_waitcnt vmcnt(0)
	s_barrier
	s_mov_b64 s[4:5], -1
.LBB0_2:
	s_and_saveexec_b64 s[2:3], s[4:5]
	s_cbranch_execz .LBB0_3
	buffer_wbl2 sc1
	buffer_inv sc1
.LBB0_3:
	s_endpgm
"""
    assert violations(joined.replace("FLAG", "0"), AMDGCN) == []
    assert "without a barrier" in violations(joined.replace("FLAG", "-1"), AMDGCN)[0]
    assert "without a barrier" in violations(joined.replace("FLAG", "s[8:9]"), AMDGCN)[0]


def test_a_kernel_that_does_not_wait():
    assert violations("st.global.b32 [ %rd1 + 0 ], %r1;\nret;", PTX) is None


@pytest.mark.parametrize(
    ("code", "rules", "old", "new", "message"),
    [
        (NVIDIA, PTX, "%r1;\n\tbar.sync 	0;", "%r1;", "stores and then arrives without a barrier"),
        (NVIDIA, PTX, ACQUIRE, "", "goes on without an acquire"),
        (NVIDIA, PTX, ACQUIRE, "", "none acquires"),
        (NVIDIA, PTX, "bar.sync 	0;   // broadcast", "", "loads without a barrier"),
        (NVIDIA, PTX, "bar.sync 	0;   // broadcast", "", "branches on a poll before a barrier"),
        (NVIDIA, PTX, "bra.uni 	$L__BB0_1", "bra.uni 	$L__BB0_3", "polls only once"),
        (AMD, AMDGCN, "s_barrier", "", "stores and then arrives without a barrier"),
        (AMD, AMDGCN, "s_waitcnt vmcnt(0)\n\tv_mov", "v_mov", "other waves' stores may be in flight"),
    ],
)
def test_what_is_missing(code, rules, old, new, message):
    assert old in code
    assert any(message in violation for violation in violations(code.replace(old, new, 1), rules))
