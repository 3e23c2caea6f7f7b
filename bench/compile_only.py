"""Compile every kernel for GPUs that are not at hand; report registers, spills, shared memory and widths of loads.

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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("bench.compile_only: TRITON_INTERPRET=1 replaces the compiler; unset it")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from bench.listings import AMDGCN, PTX, violations
from hawk_kernels.backends.kernels import (
    attention_column_mean,
    compact,
    finish,
    greedy,
    queries_and_keys,
    score_and_select,
    score_hidden,
    score_peaks,
    select_topk,
)
from hawk_kernels.backends.kernels.configs import Shape, config_for
from hawk_kernels.backends.kernels.head_norms import MODES
from hawk_kernels.backends.kernels.plan import Plan
from hawk_kernels.backends.kernels.views import stride_unit

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
# What the kernels that select work with, and where they write.
MEMORY = finish.Memory(floats="*fp32", words="*i32", counters="*i32")
OUTPUTS = finish.Outputs(scores="*fp32", mask="*i1", indices="*i64")
_MASKS = {"mask_ptr": "*i1", "q_mask_ptr": "*i1", "k_mask_ptr": "*i1"}
# Integers that are multiples of 16 for every model, as strides are.
_MULTIPLES = {"hidden_size", "columns_per_program"}
_BY_16 = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Variant:
    """One specialisation of one kernel.

    Attributes:
        name: what the table calls it.
        kernel: the jitted function.
        pointers: types of pointers by argument, where they are not float32.
        constants: values of constants by argument.
        num_warps: warps of a program.
        max_registers: of a thread, None leaves their number to the compiler.
        groups: arguments that are tuples; a field is a type, or the number that it always has.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    max_registers: int | None = None
    groups: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What a variant costs on a target, and what is wrong with how its programs wait for each other.

    On AMD the registers are the vector registers. `loads` says how many instructions load how many bytes a thread from
    global memory, by the bytes, widest first. Where no programs wait, `violations` is None.
    """

    variant: str
    target: str
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int
    loads: dict[int, int]
    violations: list[str] | None


def variants(quick: bool = False, target: str = "sm_90") -> Iterator[Variant]:
    """Yield the shapes that differ in code: dtype, norm, head size, row length, masks; as the target's table cuts them.

    The quick ones are one of each kernel, of those that need most registers.
    """
    if quick:
        yield _fused(target, "bf16", "softmax", 72, 1024, 16384, True)
        yield _select(131072)
        yield _hidden(target, "bf16", "l2", 3584, 28, 4, 128, 5200)
        yield _peaks("fp32", "softmax", 256, 64, 16384)
        yield from _columns("fp32", 128, 1, 16384, "causal rows max")
        yield _compaction("bf16")
        yield _merging("bf16")
        yield from _greedy(2896)
        return
    fused = [(dtype, mode, 128, 64, 1296, True) for dtype in DTYPES for mode in MODES]
    fused += [("bf16", "l2", head_dim, 64, 1296, False) for head_dim in (16, 64, 72, 80, 96, 256)]
    fused += [("fp32", mode, 256, 64, 1296, True) for mode in (None, "l2")]
    fused += [
        ("bf16", "l2", 128, 64, num_keys, False) for num_keys in (1, 576, 2048, 2880, 5120, 16384, 131072, 262144)
    ]
    fused += [(dtype, mode, 128, 1024, 16384, True) for dtype in ("bf16", "fp32") for mode in MODES]
    for dtype, mode, head_dim, num_queries, num_keys, masked in dict.fromkeys(fused):
        yield _fused(target, dtype, mode, head_dim, num_queries, num_keys, masked)
    yield _fused(target, "bf16", "l2", 128, 64, 131072, True, selects=False)
    for num_keys in (1, 1296, 2048, 131072):
        yield _select(num_keys)
    hidden_states = [(dtype, mode, 3584, 28, 4, 128, 1360) for dtype in DTYPES for mode in MODES]
    hidden_states += [("bf16", "l2", *layer) for layer in ((4096, 32, 32, 128, 640), (896, 14, 2, 64, 300))]
    hidden_states += [(dtype, "l2", 3584, 28, 4, 128, num_tokens) for dtype in DTYPES for num_tokens in (5200, 131200)]
    for dtype, mode, *shape in hidden_states:
        yield _hidden(target, dtype, mode, *shape)
    peaks = [(dtype, mode, 128, 64, 1296) for dtype in DTYPES for mode in MODES]
    peaks += [(dtype, "softmax", head_dim, 64, 1296) for dtype in ("fp32", "bf16") for head_dim in (16, 64, 80, 256)]
    peaks += [(dtype, "softmax", 128, 8, 16384) for dtype in ("fp32", "bf16")]
    for dtype, mode, *shape in peaks:
        yield _peaks(dtype, mode, *shape)
    columns = [(dtype, head_dim, 1024, 1024, "dense") for dtype in DTYPES for head_dim in (64, 72, 80, 96, 128, 256)]
    columns += [("bf16", 80, 6400, 6400, "segments"), ("fp32", 80, 6400, 6400, "segments")]
    columns += [(dtype, 128, 1, 16384, "causal rows max") for dtype in DTYPES]
    for dtype, head_dim, num_queries, num_keys, kind in columns:
        yield from _columns(dtype, head_dim, num_queries, num_keys, kind)
    for dtype in (*DTYPES, "fp64"):
        yield _compaction(dtype)
        yield _merging(dtype)
    for num_tokens in (80, 592, 2896, 8192):
        yield from _greedy(num_tokens)


def _compaction(dtype: str) -> Variant:
    config = compact.launch_config(1, 5120, 1024, 3584, int(dtype[-2:]) // 8)
    constants = {"HAS_POSITIONS": True, "KEEP_IS_ALIGNED": True, "embeds_stride_c": 1, **config["blocks"]}
    pointer = {**DTYPES, "fp64": "*fp64"}[dtype]
    integers = ("positions_ptr", "packed_positions_ptr", "attention_mask_ptr", "source_ptr")
    pointers = {"embeds_ptr": pointer, "packed_ptr": pointer, "keep_ptr": "*i1", **dict.fromkeys(integers, "*i64")}
    return Variant(f"compact {dtype}", compact._compact_kernel, pointers, constants, config["num_warps"])


def _merging(dtype: str) -> Variant:
    plain = _compaction(dtype)
    wide = triton.language.float64 if dtype == "fp64" else triton.language.float32
    constants = {"ACCUMULATOR": wide, "BLOCK_ENTRIES": compact._BLOCK_ENTRIES, **plain.constants}
    pointers = {"target_ptr": "*i64", "merge_source_ptr": "*i64", **plain.pointers}
    return Variant(f"merge {dtype}", compact._merge_kernel, pointers, constants, plain.num_warps)


def _greedy(num_tokens: int) -> Iterator[Variant]:
    config = greedy.launch_config(num_tokens)
    integers = {"budget_ptr": "*i64", "order_ptr": "*i64"}
    constants, name = {"HAS_BUDGET": True, **config["block"]}, f"M={num_tokens}"
    yield Variant(f"max-min picks {name}", greedy._max_min_kernel, integers, constants, config["num_warps"])
    constants = {**constants, **config["rows"]}
    yield Variant(f"dpp picks {name}", greedy._dpp_kernel, integers, constants, config["num_warps"])


def _columns(dtype: str, head_dim: int, num_queries: int, num_keys: int, kind: str) -> Iterator[Variant]:
    config = attention_column_mean.launch_config(16, num_queries, num_keys, head_dim, 4 if dtype == "fp32" else 2)
    pass_constants = {
        "HEAD_DIM": head_dim,
        "CAUSAL": "causal" in kind,
        "SEGMENTED": "segments" in kind,
        "HAS_Q_ROWS": "rows" in kind,
        "UPCAST": False,
        "STRIDE_UNIT": stride_unit(head_dim),
        "q_stride_d": 1,
        "k_stride_d": 1,
        **config["blocks"],
    }
    maximum, counted = {"MAXIMUM": "max" in kind}, kind != "dense"
    pointers = {"q_ptr": DTYPES[dtype], "k_ptr": DTYPES[dtype], "starts_ptr": "*i32", "ends_ptr": "*i32"}
    pointers["q_rows_ptr"] = "*i1"
    name = f"{dtype} D={head_dim} N={num_queries} {kind}"
    warps = config["num_warps"]
    yield Variant(f"row pass {name}", attention_column_mean._row_pass, pointers, pass_constants, warps)
    constants = {**pass_constants, **maximum}
    yield Variant(f"column pass {name}", attention_column_mean._column_pass, pointers, constants, warps)
    constants = {**maximum, "MEAN": counted, "HAS_COUNTS": counted, "HAS_WEIGHTS": counted, "BLOCK": 256}
    yield Variant(f"finish {name}", attention_column_mean._finish, {}, constants, 4)


def _fused(
    target: str,
    dtype: str,
    mode: str | None,
    head_dim: int,
    num_queries: int,
    num_keys: int,
    masked: bool,
    selects: bool = True,
) -> Variant:
    config = config_for(target, "score_and_select", Shape("fp32" if dtype == "fp32" else "half", head_dim, 4, num_keys))
    plan = score_and_select.make_plan(1, 28, 4, num_queries, num_keys, head_dim, mode, selects, config)
    options: dict[str, Any] = dict.fromkeys(("HAS_Q_MASK", "HAS_K_MASK"), masked)
    options |= {"ROUNDING": "floor", "INTERPRETED": False, "STRIDE_UNIT": stride_unit(head_dim)}
    pointer = DTYPES[dtype]
    groups = {
        "tensors": queries_and_keys.Tensors(q=pointer, k=pointer, w="*fp32"),
        "strides": queries_and_keys.Strides("i32", 1, "i32", 1, w=1),
        "memory": MEMORY,
        "outputs": OUTPUTS,
    }
    name = f"score_and_select {dtype} {mode} D={head_dim} N={num_queries} M={num_keys}{' masked' if masked else ''}"
    return _planned(name, score_and_select._score_and_select_kernel, groups, options, plan)


def _peaks(dtype: str, mode: str | None, head_dim: int, num_queries: int, num_keys: int) -> Variant:
    itemsize = 4 if dtype == "fp32" else 2
    plan = score_peaks.make_plan(1, 28, 4, num_queries, num_keys, head_dim, itemsize, mode)
    options: dict[str, Any] = {"HAS_Q_MASK": True, "HAS_K_MASK": True, "INTERPRETED": False}
    options["STRIDE_UNIT"] = stride_unit(head_dim)
    pointer = DTYPES[dtype]
    groups = {
        "tensors": queries_and_keys.Tensors(q=pointer, k=pointer, w="*fp32"),
        "strides": queries_and_keys.Strides("i32", 1, "i32", 1, w=1),
        "memory": MEMORY,
        "outputs": OUTPUTS,
    }
    name = f"score_peaks {dtype} {mode} D={head_dim} N={num_queries} M={num_keys}"
    return _planned(name, score_peaks._score_peaks_kernel, groups, options, plan)


def _hidden(
    target: str,
    dtype: str,
    mode: str | None,
    hidden_size: int,
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    num_tokens: int,
) -> Variant:
    shape = (num_tokens, hidden_size, num_heads, num_key_value_heads, head_dim)
    config = config_for(target, "score_hidden", Shape("fp32" if dtype == "fp32" else "half", 0, 1, num_tokens))
    plan = score_hidden.make_plan(1, *shape, mode, True, config)
    options: dict[str, Any] = dict.fromkeys(("HAS_NORM_WEIGHT", "HAS_QUERY_BIAS", "HAS_KEY_BIAS"), True)
    options |= {"ROUNDING": "floor", "INTERPRETED": False}
    pointer = DTYPES[dtype]
    tensors = score_hidden.Tensors._make([pointer] * 6 + ["*fp32"])
    strides: dict[str, Any] = dict.fromkeys(score_hidden.Strides._fields, 1)
    strides |= dict.fromkeys(("x_t", "wq_o", "wk_o"), "i32")
    groups = {
        "tensors": tensors,
        "strides": score_hidden.Strides(**strides),
        "memory": score_hidden.Memory(*MEMORY, terms=pointer),
        "outputs": OUTPUTS,
    }
    name = f"score_hidden {dtype} {mode} C={hidden_size} H={num_heads} D={head_dim} T={num_tokens}"
    return _planned(name, score_hidden._score_hidden_kernel, groups, options, plan)


def _planned(name: str, kernel: Any, groups: dict[str, Any], options: dict[str, Any], plan: Plan) -> Variant:
    constants = {**options, "STATIC": plan.static}
    return Variant(name, kernel, _MASKS, constants, plan.options["num_warps"], plan.options.get("maxnreg"), groups)


def _select(num_keys: int) -> Variant:
    plan = select_topk.make_plan(1, num_keys)
    constants = {"HAS_MASK": True, "ROUNDING": "floor", "STATIC": plan.static}
    groups = {"memory": MEMORY, "outputs": OUTPUTS}
    kernel, warps = select_topk._select_kernel, plan.options["num_warps"]
    return Variant(f"select M={num_keys}", kernel, _MASKS, constants, warps, groups=groups)


class _PretendedDriver:
    """Tells the kernels that ask which target they are compiled for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target


def build(variant: Variant, target_name: str) -> Any:
    """Compile a variant for a target, without a device."""
    driver.set_active(_PretendedDriver(TARGETS[target_name]))
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    divisible: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(variant.kernel.params):
        name = parameter.name
        group = variant.groups.get(name)
        if name in variant.constants:
            signature[name] = "constexpr"
            constants[(position,)] = variant.constants[name]
        elif group is not None:
            signature[name] = type(group)(*(leaf if isinstance(leaf, str) else "constexpr" for leaf in group))
            for place, leaf in enumerate(group):
                if not isinstance(leaf, str):
                    constants[(position, place)] = leaf
                elif leaf.startswith("*") or name == "strides":
                    divisible[(position, place)] = _BY_16
        else:
            signature[name] = parameter.annotation_type or _type_of(name, variant.pointers)
            is_multiple = name.endswith("_ptr") or "stride" in name or name in _MULTIPLES
            if is_multiple and not parameter.do_not_specialize:
                divisible[(position,)] = _BY_16
    source = ASTSource(variant.kernel, signature, constants, divisible)
    options = {"num_warps": variant.num_warps, "enable_fp_fusion": True}
    if variant.max_registers is not None and TARGETS[target_name].backend == "cuda":
        options["maxnreg"] = variant.max_registers
    return triton.compile(source, target=TARGETS[target_name], options=options)


def compile_variant(variant: Variant, target_name: str) -> Compiled:
    """Compile for a target, and read what that costs."""
    target, compiled = TARGETS[target_name], build(variant, target_name)
    if target.backend == "cuda":
        registers, spills = _ptxas_report(compiled.asm["ptx"], target.arch)
        loads = loads_of_ptx(compiled.asm["ptx"])
        wrong = violations(compiled.asm["ptx"], PTX)
    else:
        assembly = compiled.asm["amdgcn"]
        registers = _last_number(r"\.vgpr_count:\s+(\d+)", assembly)
        spills = _last_number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        loads = loads_of_amdgcn(assembly)
        wrong = violations(assembly, AMDGCN)
    shared = compiled.metadata.shared
    return Compiled(variant.name, target_name, variant.num_warps, registers, spills, shared, loads, wrong)


def loads_of_ptx(ptx: str) -> dict[int, int]:
    """Count the loads from global memory by their bytes, those that go to shared memory at once among them."""
    direct = re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    to_shared = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)", ptx)
    return _counted([int(count or 1) * int(bits) // 8 for count, bits in direct] + [int(size, 0) for size in to_shared])


def loads_of_amdgcn(assembly: str) -> dict[int, int]:
    """Count the loads from global memory by their bytes."""
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "sbyte": 1}
    found = re.findall(r"\b(?:global|buffer)_load_(dword(?:x[234])?|[us]?short|[us]byte)", assembly)
    return _counted([sizes[name] for name in found])


def _counted(sizes: list[int]) -> dict[int, int]:
    return {size: sizes.count(size) for size in sorted(set(sizes), reverse=True)}


def _type_of(name: str, pointers: dict[str, str]) -> str:
    if name.endswith("_ptr"):
        return pointers.get(name, "*fp32")
    return "fp32" if name in ("scale", "epsilon") else "i32"


def _last_number(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[-1])


def _ptxas_report(ptx: str, arch: int) -> tuple[int, int]:
    """Return the registers of a thread and the bytes spilled (stores and loads), as ptxas reports them."""
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


def compile_target(quick: bool, target_name: str) -> list[Compiled]:
    """Compile all variants, or the quick ones, for a target."""
    return [compile_variant(variant, target_name) for variant in variants(quick, target_name)]


def main() -> None:
    """Compile, print a row for each kernel and target, and write them as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_only", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="one variant of each kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets at a time; default: the processors")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()

    rows = []
    heads = f"{'warps':>5} {'regs':>5} {'spills':>6} {'shared':>7}  {'waiting':<7}"
    print(f"{'kernel':<46} {'target':<7} {heads}  bytes a thread x loads")
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for compiled in pool.map(partial(compile_target, arguments.quick), arguments.target or TARGETS):
            for row in compiled:
                rows.append(asdict(row))
                loads = ", ".join(f"{size} x {count}" for size, count in row.loads.items())
                waiting = "-" if row.violations is None else "; ".join(row.violations) or "ok"
                print(
                    f"{row.variant:<46} {row.target:<7} {row.num_warps:>5} {row.registers:>5} {row.spills:>6} "
                    f"{row.shared_bytes:>7}  {waiting:<7}  {loads}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
