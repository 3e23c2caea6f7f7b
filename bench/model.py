"""Compute the bytes and floating point operations that a call must move and do; nothing is measured.

    python -m bench.model [--gpu H200 ...] [--bandwidth 4.3e12 --flops 790e12] [--json FILE]

Each input is read once and each output written once; workspace is what is written and read again in between, and
goes to memory where it does not fit the L2 cache. The floor is the longer of bytes over bandwidth and operations over
rate, by the vendors' datasheets or by what `--bandwidth` and `--flops` say; launches come on top of it.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from bench import cli
from bench.cases import GPU, KEEP_RATIO, Case
from bench.environment import RESULTS, write_json

CAPTION = (
    "Computed from shapes and the vendors' datasheets, not measured: each input read and each output written once, the "
    "workspace\nwritten and read again in between. Floor: the longer of bytes over bandwidth and operations over rate, "
    "with the workspace\nwhere it does not fit the L2 cache, without launches."
)
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# A float32 query as a sum of terms in the keys' dtype, each of which is multiplied.
_TERMS = {"bf16": 3, "fp16": 3, "fp32": 1}


@dataclass(frozen=True)
class Machine:
    """Peak rates a second, half-precision operations on tensor cores; the L2 cache in bytes."""

    name: str
    bandwidth: float
    half_flops: float
    float_flops: float
    l2_bytes: float


MACHINES = {
    "H200": Machine("H200", 4.8e12, 989e12, 67e12, 50e6),
    "H100": Machine("H100 SXM", 3.35e12, 989e12, 67e12, 50e6),
    "A100": Machine("A100 80 GB SXM", 2.039e12, 312e12, 19.5e12, 40e6),
}


@dataclass(frozen=True)
class Cost:
    """What a call moves and does.

    Attributes:
        read: bytes of inputs.
        written: bytes of outputs.
        workspace: bytes written and read again, each counted.
        flops: multiplications and additions.
    """

    read: int
    written: int
    workspace: int
    flops: int

    def floor(self, machine: Machine, dtype: str) -> float:
        """Return the microseconds that `machine` needs at least."""
        rate = machine.float_flops if dtype == "fp32" else machine.half_flops
        # written once and read once, so half of it is held at a time
        spilled = self.workspace if self.workspace / 2 > machine.l2_bytes else 0
        return max((self.read + self.written + spilled) / machine.bandwidth, self.flops / rate) * 1e6


def _outputs(batch: int, num_keys: int) -> int:
    """Count the bytes of scores, mask and indices."""
    return batch * (4 * num_keys + num_keys + 8 * max(1, int(KEEP_RATIO * num_keys)))


def ours(case: Case) -> Cost:
    """Return the cost of our kernel: one launch that reads its inputs once."""
    decoder, batch, m, n = case.decoder, case.batch, case.num_keys, case.num_queries
    heads, groups, dim, hidden = (
        decoder.num_heads,
        decoder.num_key_value_heads,
        decoder.head_dim,
        decoder.hidden_size,
    )
    size = _BYTES[case.dtype]
    if case.kind == "scores":
        return Cost(4 * batch * m, _outputs(batch, m), 0, 0)
    logit_rows = groups if case.normalize is None else heads
    workspace = 2 * 4 * batch * logit_rows * m
    if case.kind == "queries":
        read = size * batch * dim * (heads * n + groups * m)
        flops = batch * heads * dim * (n + 2 * m * _TERMS[case.dtype])
        return Cost(read, _outputs(batch, m), workspace, flops)
    weights = size * dim * hidden * (heads + groups)
    read = weights + size * batch * hidden * (n + m)
    workspace += 2 * 4 * batch * heads * (dim + hidden)
    # mean of the normalised text, W_q, W_k folded into the query; then the norm and the product of each visual row
    folding = 4 * n * hidden + 4 * heads * dim * hidden
    scoring = 2 * m * hidden + 2 * heads * m * hidden * _TERMS[case.dtype]
    return Cost(read, _outputs(batch, m + n), workspace, batch * (folding + scoring))


def released(case: Case) -> Cost:
    """Return the cost of the released steps, one kernel each; every token's hidden state is projected first."""
    decoder, batch, m, n = case.decoder, case.batch, case.num_keys, case.num_queries
    heads, groups, dim, hidden = (
        decoder.num_heads,
        decoder.num_key_value_heads,
        decoder.head_dim,
        decoder.hidden_size,
    )
    size = _BYTES[case.dtype]
    indices = 8 * batch * max(1, int(KEEP_RATIO * m))
    if case.kind == "scores":
        return Cost(4 * batch * m, indices, 2 * (4 + 8) * indices // 8, 0)
    keys, repeated, logits, c = groups * m * dim, heads * m * dim, heads * n * m, heads * m
    # repeat writes and the product reads the keys; logits are written, divided, averaged; c goes through five steps
    workspace = size * batch * (2 * repeated + 4 * logits + 9 * c)
    flops = batch * (2 * logits * dim + 2 * logits + 6 * c)
    if case.kind == "queries":
        return Cost(size * batch * (heads * n * dim + keys), indices, workspace, flops)
    tokens = m + n
    projected = tokens * dim * (heads + groups)
    read = size * (batch * tokens * hidden + dim * hidden * (heads + groups))
    workspace += size * batch * (4 * tokens * hidden + 2 * projected)
    return Cost(read, indices, workspace, flops + batch * 2 * projected * hidden)


def column_mean(batch: int, heads: int, rows: int, keys: int, head_dim: int, size: int) -> Cost:
    """Return the cost of `attention_column_mean`, which makes the logits twice: for row norms and column sums."""
    read = size * batch * heads * head_dim * (rows + keys)
    logits = batch * heads * rows * keys
    return Cost(read, 4 * batch * keys, 2 * 4 * batch * heads * rows, 2 * (2 * logits * head_dim) + 4 * logits)


def compaction(batch: int, kept: int, hidden: int, axes: int, size: int) -> Cost:
    """Return the cost of `compact`: each kept row of embeddings, position ids and mask is read and written once."""
    moved = batch * kept * (size * hidden + 8 * axes + 8)
    return Cost(moved, moved, 0, 0)


def prefill_flops(config: Any, tokens: int) -> float:
    """Operations of a prefill of one sample that wants one row of logits, without the vision encoder.

    Args:
        config: a Qwen2.5-VL text config.
        tokens: of the prompt; with causal attention, half the pairs count.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    pairs = tokens * (tokens + 1) / 2
    layers = config.num_hidden_layers * (2 * layer * tokens + 4 * pairs * config.hidden_size)
    return float(layers + 2 * config.hidden_size * config.vocab_size)


def rows(cases: tuple[Case, ...], machines: list[Machine]) -> list[dict[str, Any]]:
    """Return a row for each case and way."""
    found = []
    for case in cases:
        for name, cost in (("ours", ours(case)), ("released steps", released(case))):
            floors = {machine.name: cost.floor(machine, case.dtype) for machine in machines}
            found.append({"case": str(case), "way": name, **asdict(cost), "floor_microseconds": floors})
    return found


def markdown(found: list[dict[str, Any]], machines: list[Machine]) -> str:
    """Render the rows as a table."""
    names = [machine.name for machine in machines]
    lines = [
        f"| case | way | read MB | written MB | workspace MB | GFLOP | {' | '.join(f'{n} floor us' for n in names)} |",
        "|---|---|" + "---:|" * (4 + len(names)),
    ]
    for row in found:
        megabytes = (f"{row[part] / 1e6:.3f}" for part in ("read", "written", "workspace"))
        floors = (f"{row['floor_microseconds'][name]:.2f}" for name in names)
        cells = [row["case"], row["way"], *megabytes, f"{row['flops'] / 1e9:.3f}", *floors]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table and write it."""
    parser = cli.parser("bench.model", __doc__, json="bench/results/model.json")
    parser.add_argument("--gpu", choices=MACHINES, action="append", help="default: all of them, by datasheet")
    parser.add_argument("--bandwidth", type=float, help="bytes a second of a machine of your own")
    parser.add_argument(
        "--flops", type=float, help="half-precision operations a second of that machine (float32: a fifteenth)"
    )
    arguments = parser.parse_args()
    if (arguments.bandwidth is None) != (arguments.flops is None):
        parser.error("--bandwidth and --flops: expected both or neither")
    if arguments.bandwidth is None:
        machines = [MACHINES[name] for name in arguments.gpu or MACHINES]
    else:
        machines = [Machine("given", arguments.bandwidth, arguments.flops, arguments.flops / 15, 50e6)]
    path = arguments.json or RESULTS / "model.json"
    found = rows(GPU, machines)
    print(CAPTION + "\n")
    print(markdown(found, machines))
    write_json(path, {"kind": "model, not measured", "machines": [asdict(m) for m in machines], "rows": found})
    print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
