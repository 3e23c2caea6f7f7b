"""Compile every kernel for GPUs that are not there, and say what each costs: registers, spills, shared memory.

    python -m bench.compile_only [--target sm_90 ...] [--json FILE] [--quick]

Needs Triton and no device: NVIDIA code goes through the ptxas of Triton's wheel, AMD code through its LLVM. Must run
without TRITON_INTERPRET, which replaces the compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("bench.compile_only: TRITON_INTERPRET=1 replaces the compiler; unset it")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hawk_kernels.backends.triton import column_stats, score_select, select_rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
_INT64 = {"numerator", "denominator"}


@dataclass(frozen=True)
class Variant:
    """One specialisation of one kernel."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    num_warps: int


@dataclass(frozen=True)
class Compiled:
    """What a variant costs on a target; AMD's registers are the vector ones."""

    variant: str
    target: str
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int
    barrier_before_arrival: bool | None


def variants(quick: bool = False) -> Iterator[Variant]:
    """The shapes that differ in code: dtype, norm, head size, row length, masks."""
    fused = [
        (dtype, mode, head_dim, 1296, True) for dtype in DTYPES for mode in score_select.MODES for head_dim in (128,)
    ]
    fused += [("bf16", "l2", head_dim, 1296, False) for head_dim in (16, 64, 72, 80, 96, 256)]
    fused += [("fp32", "l2", 256, 1296, True)]
    fused += [("bf16", "l2", 128, num_keys, False) for num_keys in (1, 576, 2048, 2880, 5120, 16384)]
    fused += [(dtype, mode, 128, 16384, True) for dtype in ("bf16", "fp32") for mode in score_select.MODES]
    if quick:
        fused = [("bf16", "l2", 128, 576, False), ("fp32", None, 256, 1296, True), ("bf16", "softmax", 72, 16384, True)]
    for dtype, mode, head_dim, num_keys, masked in dict.fromkeys(fused):
        yield _fused(dtype, mode, head_dim, num_keys, masked)
    yield _fused("bf16", "l2", 128, 131072, True, finish=score_select._NORMS.value)
    for mode in score_select.MODES:
        constants = {"MODE": score_select.MODES[mode], "HAS_K_MASK": True, "BLOCK": 1024}
        pointers = {"w_ptr": "*fp32", "k_mask_ptr": "*i1"}
        yield Variant(f"importance {mode}", score_select._importance_kernel, pointers, constants, 4)
    for num_keys in (1, 1296, 2048, 131072):
        yield _select(num_keys)
    columns = [(dtype, head_dim, 1024, 1024, "dense") for dtype in DTYPES for head_dim in (64, 72, 80, 96, 128, 256)]
    columns += [("bf16", 80, 6400, 6400, "segments"), ("fp32", 80, 6400, 6400, "segments")]
    columns += [(dtype, 128, 1, 16384, "causal rows max") for dtype in DTYPES]
    for dtype, head_dim, num_queries, num_keys, kind in columns[4:5] + columns[-3:] if quick else columns:
        yield from _columns(dtype, head_dim, num_queries, num_keys, kind)


def _columns(dtype: str, head_dim: int, num_queries: int, num_keys: int, kind: str) -> Iterator[Variant]:
    config = column_stats.launch_config(16, num_queries, num_keys, head_dim, 4 if dtype == "fp32" else 2)
    pass_constants = {
        "HEAD_DIM": head_dim,
        "CAUSAL": "causal" in kind,
        "SEGMENTED": "segments" in kind,
        "HAS_Q_ROWS": "rows" in kind,
        "UPCAST": False,
        "q_stride_d": 1,
        "k_stride_d": 1,
        **config["blocks"],
    }
    maximum, counted = {"MAXIMUM": "max" in kind}, kind != "dense"
    pointers = {"q_ptr": DTYPES[dtype], "k_ptr": DTYPES[dtype], "starts_ptr": "*i32", "ends_ptr": "*i32"}
    pointers["q_rows_ptr"] = "*i1"
    name = f"{dtype} D={head_dim} N={num_queries} {kind}"
    warps = config["num_warps"]
    yield Variant(f"row pass {name}", column_stats._row_pass, pointers, pass_constants, warps)
    constants = {**pass_constants, **maximum}
    yield Variant(f"column pass {name}", column_stats._column_pass, pointers, constants, warps)
    constants = {**maximum, "MEAN": counted, "HAS_COUNTS": counted, "HAS_WEIGHTS": counted, "BLOCK": 256}
    yield Variant(f"finish {name}", column_stats._finish, {}, constants, 4)


def _fused(
    dtype: str, mode: str | None, head_dim: int, num_keys: int, masked: bool, finish: int | None = None
) -> Variant:
    config = score_select.launch_config(7, 4, num_keys, head_dim)
    constants = {
        "HEAD_DIM": head_dim,
        "MODE": score_select.MODES[mode],
        "HAS_Q_MASK": masked,
        "HAS_K_MASK": masked,
        "FINISH": score_select._SELECTION.value if finish is None else finish,
        "CEIL": False,
        "INTERPRETED": False,
        "q_stride_d": 1,
        "k_stride_d": 1,
        "w_stride": 1,
        **config["blocks"],
    }
    pointers = {
        "q_ptr": DTYPES[dtype],
        "k_ptr": DTYPES[dtype],
        "w_ptr": "*fp32",
        "q_mask_ptr": "*i1",
        "k_mask_ptr": "*i1",
        "counters_ptr": "*i32",
        "mask_ptr": "*i1",
        "indices_ptr": "*i64",
    }
    name = f"score_select {dtype} {mode} D={head_dim} M={num_keys}{' masked' if masked else ''}"
    return Variant(name, score_select._score_select_kernel, pointers, constants, config["num_warps"])


def _select(num_keys: int) -> Variant:
    constants = {
        "HAS_MASK": True,
        "CEIL": False,
        "IN_REGISTERS": num_keys <= select_rows.MAX_ROW_IN_REGISTERS,
        "BLOCK": select_rows.row_block(num_keys),
    }
    pointers = {"candidates_ptr": "*i1", "mask_ptr": "*i1", "indices_ptr": "*i64"}
    return Variant(f"select M={num_keys}", select_rows._select_kernel, pointers, constants, select_rows._NUM_WARPS)


def compile_variant(variant: Variant, target_name: str) -> Compiled:
    """Compile for a target without a device."""
    target = TARGETS[target_name]
    signature, divisible = {}, {}
    for position, name in enumerate(variant.kernel.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _type_of(name, variant.pointers)
        if name.endswith("_ptr") or "stride" in name:
            divisible[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, variant.constants, divisible)
    options = {"num_warps": variant.num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "cuda":
        registers, spills = _ptxas_report(compiled.asm["ptx"], target.arch)
        barrier = _barrier_before_arrival(compiled.asm["ttgir"], compiled.asm["ptx"])
    else:
        assembly = compiled.asm["amdgcn"]
        registers = _last_number(r"\.vgpr_count:\s+(\d+)", assembly)
        spills = _last_number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        barrier = None
    return Compiled(variant.name, target_name, variant.num_warps, registers, spills, compiled.metadata.shared, barrier)


def _type_of(name: str, pointers: dict[str, str]) -> str:
    if name.endswith("_ptr"):
        return pointers.get(name, "*fp32")
    if name == "scale":
        return "fp32"
    return "i64" if name in _INT64 else "i32"


def _last_number(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[-1])


def _ptxas_report(ptx: str, arch: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled (stores and loads), as ptxas says."""
    tool = triton.knobs.nvidia.ptxas_blackwell if arch >= 100 else triton.knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        suffix = "a" if arch >= 90 else ""
        command = [
            tool.path,
            "-v",
            f"--gpu-name=sm_{arch}{suffix}",
            str(source),
            "-o",
            str(source.with_suffix(".cubin")),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))
    return _last_number(r"Used (\d+) registers", report), spilled


def _barrier_before_arrival(ttgir: str, ptx: str) -> bool | None:
    """Whether a CTA-wide barrier stands between the last global store and the arrival atomic; None without one.

    In both: PTX alone may show a barrier that Triton put there for its shared memory, and may drop again.
    """
    own = _stands_between(ttgir, r"tt\.store", r"(?:ttg|gpu)\.barrier", r"atomic_rmw add, acq_rel")
    emitted = _stands_between(ptx, r"st\.global", r"bar(?:rier)?\.sync", r"atom\.(?:acq_rel\.gpu|global\.gpu\.acq_rel)")
    return own if emitted is None else bool(own) and emitted


def _stands_between(code: str, store: str, barrier: str, arrival: str) -> bool | None:
    found = re.search(arrival, code)
    if found is None:
        return None
    last_store = list(re.finditer(store, code[: found.start()]))[-1]
    return re.search(barrier, code[last_store.end() : found.start()]) is not None


def main() -> None:
    """Compile, print a row for each kernel and target, and write them as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_only", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="a few variants of each kernel")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()

    rows = []
    print(f"{'kernel':<46} {'target':<7} {'warps':>5} {'regs':>5} {'spills':>6} {'shared':>7}  barrier")
    for variant in variants(arguments.quick):
        for target in arguments.target or TARGETS:
            row = compile_variant(variant, target)
            rows.append(asdict(row))
            barrier = {None: "-", True: "yes", False: "MISSING"}[row.barrier_before_arrival]
            print(
                f"{row.variant:<46} {row.target:<7} {row.num_warps:>5} {row.registers:>5} {row.spills:>6} "
                f"{row.shared_bytes:>7}  {barrier}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
