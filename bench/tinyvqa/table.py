"""Compare the pruning methods on TinyVQA, as a paper does in its main table: `python -m bench.tinyvqa.table`.

Every method of `contenders.py` answers the same questions about unseen digits with 40, 20, 10 and 5 % of the visual
tokens, on models of one miniature (`--miniature`) that differ in their training seed. Head weights are calibrated on
training digits. A method that cannot serve a miniature's family is listed with the reason, and not asked.

Answers are kept as they come, in a journal: a run that was killed goes on, and a method that is added later is the only
one that is asked. From them come `table.json`, `table.md` and `table.png`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench import cli
from bench.tinyvqa.batches import Batch, draw_batch
from bench.tinyvqa.contenders import CONTENDERS, HAWK, KEEP_RATIOS, Contender, check_contenders
from bench.tinyvqa.encoder import Encoder
from bench.tinyvqa.evaluate import answer_ids, draw_evaluation, first_words, model_inputs, pictures_read_once
from bench.tinyvqa.intervals import summarise
from bench.tinyvqa.llava import LLAVA
from bench.tinyvqa.make import Make
from bench.tinyvqa.makes import MAKES, make_of
from bench.tinyvqa.report import draw_plot, markdown
from bench.tinyvqa.tasks import TABLE_PROMPTS as PROMPTS
from bench.tinyvqa.tasks import TABLE_SEED as SEED
from bench.tinyvqa.tasks import calibration_tasks
from hawk_kernels.checkpoint import TINY_MODEL, load_processor
from hawk_kernels.evaluation.contenders import UNPRUNED, Way, refusal
from hawk_kernels.evaluation.intervals import Questions, resampling_weights
from hawk_kernels.head_weights import read_weights_file, shipped_weights
from hawk_kernels.methods import METHODS
from hawk_kernels.tasks.identity import digest_of_parameters

RESULTS = Path("bench/results/tinyvqa")
MODELS = {"qwen": (RESULTS / "seed0", RESULTS / "seed1", TINY_MODEL), "llava": (LLAVA.shipped,)}
WHOLE = "all tokens"
TIMED_RATIO = 0.2
TIMED_ROUNDS = 21


@dataclass
class Subject:
    """A model that answers: `digest` tells its parameters apart from others'."""

    path: Path
    make: Make
    model: Any
    processor: Any
    encoder: Encoder
    digest: str

    @classmethod
    def load(cls, path: Path) -> Subject:
        """Load a checkpoint's folder, in float32 whatever it is stored in."""
        if not (path / "model.safetensors").is_file():
            raise SystemExit(
                f"error: no model in {path}; train it with python -m bench.tinyvqa.train --out {path} --seed N"
            )
        make, processor = make_of(path), load_processor(str(path))
        model = make.load_model(path)
        digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()[:16]
        return cls(path, make, model, processor, make.encoder(model, processor.tokenizer), digest)

    @property
    def name(self) -> str:
        """The name in reports."""
        return f"seed {json.loads((self.path / 'training.json').read_text())['seed']}"


def calibrated_weights(subject: Subject, folder: Path) -> dict[str, Any]:
    """Read the weights file of a model: the shipped one, or one in `folder`, measured on training digits if need be."""
    from hawk_kernels import calibrate

    if subject.path.resolve() == TINY_MODEL.resolve():
        return read_weights_file(shipped_weights()["tinyvqa"])
    path = folder / f"head_weights_{subject.name.replace(' ', '')}.json"
    if not (path.is_file() and _is_measured_on(subject.model, read_weights_file(path))):
        calibrate(subject.model, calibration_tasks(subject.make), processor=subject.processor, out=path, layers="both")
    return read_weights_file(path)


def _is_measured_on(model: Any, found: dict[str, Any]) -> bool:
    """Tell whether a weights file is that of a model, in both kinds of layers."""
    is_whole = {found.get("layers"), *found.get("other_layers", {})} == {"first", "all"}
    return is_whole and found.get("settings", {}).get("parameters") == digest_of_parameters(model)


def weights_of_heads(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights of a weights file, for heads hidden in the first layer and in all layers."""
    chosen = {found["layers"]: found["weights"]}
    others = {layers: other["weights"] for layers, other in found["other_layers"].items()}
    return {layers: torch.tensor(weights, dtype=torch.float32) for layers, weights in {**chosen, **others}.items()}


class Answers:
    """Which questions were answered right, on disk as they come: bits of a batch for each model, method and ratio."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, str] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    self.found.update(json.loads(line))
                except json.JSONDecodeError:
                    # The last line of a run that was killed while it wrote.
                    continue

    def add(self, new: dict[str, np.ndarray]) -> None:
        """Write one line of new answers, complete or not at all."""
        packed = {key: np.packbits(right).tobytes().hex() for key, right in new.items()}
        self.found.update(packed)
        needs_end = self.path.is_file() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a") as file:
            file.write(("\n" if needs_end else "") + json.dumps(packed) + "\n")

    def of(self, key: str, count: int) -> np.ndarray:
        """bool `[count]`."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.found[key]), np.uint8), count=count).astype(bool)


def answer_key(
    subject: Subject, number: int, contender: Contender | None, ratio: float, heads: dict[str, torch.Tensor]
) -> str:
    """Return the key of an answer: all it depends on but the questions, which are the same throughout a journal."""
    if contender is None:
        return f"{subject.digest}/{number}/{WHOLE}"
    weights = contender.head_weights(heads)
    if isinstance(weights, torch.Tensor):
        weights = hashlib.sha256(json.dumps(weights.tolist()).encode()).hexdigest()[:8]
    options = json.dumps(dict(contender.options), sort_keys=True)
    stage = f" after {contender.after}" if contender.after else ""
    return f"{subject.digest}/{number}/{contender.method} {options} {weights}{stage}@{ratio}"


def layers_read(contender: Contender, depth: int) -> dict[str, Any]:
    """Tell for each keep ratio the stages of a method and the share of the visual tokens that a layer reads."""
    return {
        str(ratio): {
            "stages": {str(layer): round(share, 4) for layer, share in contender.stages(ratio, depth).items()},
            "mean_share": round(contender.mean_share(ratio, depth), 4),
        }
        for ratio in KEEP_RATIOS
    }


@torch.no_grad()
def answer(
    subject: Subject,
    batch: Batch,
    wanted: Sequence[tuple[str, Contender | None, float]],
    heads: dict[str, torch.Tensor],
) -> dict[str, np.ndarray]:
    """Return right or wrong, bool `[questions]`, for each `(key, contender, ratio)`; None prunes nothing."""
    inputs, right_words = model_inputs(subject.encoder, batch), answer_ids(subject.encoder, batch)
    results: dict[str, np.ndarray] = {}

    def ask(key: str, contender: Contender | None, ratio: float) -> None:
        way = UNPRUNED if contender is None else Way(contender.with_heads(heads), ratio)
        with way.block(subject.model):
            said = first_words(subject.model, inputs)
        results[key] = (said == right_words).numpy()

    def watches_encoder(contender: Contender | None) -> bool:
        return contender is not None and METHODS[contender.method]().reads_encoder()

    with pictures_read_once(subject.model, subject.encoder, batch):
        for item in wanted:
            if not watches_encoder(item[1]):
                ask(*item)
    for item in wanted:
        if watches_encoder(item[1]):
            ask(*item)
    return results


def lines(contenders: Sequence[Contender]) -> Iterator[tuple[Contender | None, float]]:
    """List the lines of the table: all tokens, then every contender at every keep ratio."""
    yield None, 1.0
    for contender in contenders:
        for ratio in KEEP_RATIOS:
            yield contender, ratio


@torch.no_grad()
def refusals(
    subject: Subject, contenders: Sequence[Contender], heads: dict[str, torch.Tensor], batch: Batch
) -> dict[str, str]:
    """Try each contender on one question, and return why those cannot serve the subject's family that cannot."""
    one = Batch(batch.layout, batch.pages_of(0), batch.scenes[:1], [batch.questions[0][:1]])
    inputs = model_inputs(subject.encoder, one)
    ask = partial(first_words, subject.model, inputs)
    reasons = {c.label: refusal(Way(c.with_heads(heads), TIMED_RATIO), subject.model, ask) for c in contenders}
    return {label: reason for label, reason in reasons.items() if reason is not None}


def prefill_times(
    subject: Subject, contenders: Sequence[Contender], heads: dict[str, torch.Tensor]
) -> dict[str, dict[str, float]]:
    """Measure the median milliseconds of a prefill of one question, with vision tower, interleaved over all methods."""
    found: dict[str, dict[str, float]] = {}
    for layout in subject.make.timed_layouts:
        batch = draw_batch(np.random.default_rng(SEED), "held_out", 1, layout, {"colour->digit": 1})
        inputs = model_inputs(subject.encoder, batch)
        times: dict[str, list[float]] = {WHOLE: [], **{c.label: [] for c in contenders}}

        def timed(label: str, run: Callable[[], Any], times: dict[str, list[float]] = times) -> None:
            started = time.perf_counter()
            run()
            times[label].append(time.perf_counter() - started)

        for _ in range(TIMED_ROUNDS + 1):
            with torch.no_grad():
                timed(WHOLE, partial(first_words, subject.model, inputs))
                for contender in contenders:
                    with contender.with_heads(heads).block(subject.model, TIMED_RATIO):
                        timed(contender.label, partial(first_words, subject.model, inputs))
        found[str(layout)] = {label: round(1e3 * statistics.median(of[1:]), 3) for label, of in times.items()}
    return found


def describe_questions(batches: Sequence[Batch], names: tuple[str, ...]) -> Questions:
    """List kind (one of `names`), prompt and layout of every question, in the order of the answers."""
    kinds: list[str] = []
    prompts: list[int] = []
    layouts: list[str] = []
    for batch in batches:
        for row in batch.questions:
            kinds += [question.kind for question in row]
            prompts += [len(layouts)] * len(row)
            layouts.append(str(batch.layout))
    return Questions(np.array(kinds), np.array(prompts), np.array(layouts), names)


def build(
    models: Sequence[Path],
    out: Path,
    prompts: int,
    seed: int,
    times: bool,
    show_progress: bool,
    methods: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Calibrate, ask what has not been asked yet, and collect everything in one dict for JSON.

    Args:
        models: folders of checkpoints of one make.
        out: where the journal and calibrated head weights are kept.
        prompts: about how many.
        seed: of the questions.
        times: whether prefills are timed.
        show_progress: a progress bar on stderr.
        methods: names in `METHODS` of those to compare; all where left out. HAWK, the reference, is always there.

    Raises:
        SystemExit: a contender that is none, models of two makes, or no model.
    """
    contenders = [c for c in CONTENDERS if methods is None or c.label == HAWK or c.method in methods]
    check_contenders(contenders)
    out.mkdir(parents=True, exist_ok=True)
    subjects = [Subject.load(path) for path in models]
    make = subjects[0].make
    if any(subject.make is not make for subject in subjects):
        raise SystemExit("error: --models: expected models of one make, which are asked the same questions")
    weights = [calibrated_weights(subject, out) for subject in subjects]
    batches = draw_evaluation(make, seed, prompts)
    answers = Answers(out / f"answers-{prompts}-{seed}.jsonl")
    refused = refusals(subjects[0], contenders, weights_of_heads(weights[0]), batches[0])
    contenders = [c for c in contenders if c.label not in refused]
    everything = list(lines(contenders))
    plan = [
        (subject, number, [(answer_key(subject, number, c, r, weights_of_heads(w)), c, r) for c, r in everything], w)
        for subject, w in zip(subjects, weights, strict=True)
        for number in range(len(batches))
    ]
    for subject, number, keys, w in tqdm(plan, desc="table", unit="batch", disable=not show_progress):
        wanted = [item for item in keys if item[0] not in answers.found]
        if wanted:
            answers.add(answer(subject, batches[number], wanted, weights_of_heads(w)))

    questions = describe_questions(batches, make.kinds)
    sizes = [sum(len(row) for row in batch.questions) for batch in batches]

    def rights(contender: Contender | None, ratio: float) -> np.ndarray:
        return np.stack(
            [
                np.concatenate(
                    [
                        answers.of(answer_key(s, n, contender, ratio, weights_of_heads(w)), size)
                        for n, size in enumerate(sizes)
                    ]
                )
                for s, w in zip(subjects, weights, strict=True)
            ]
        )

    whole = rights(None, 1.0)
    right = {c.label: {r: rights(c, r) for r in KEEP_RATIOS} for c in contenders}
    accuracy = [
        {"mean": 0.0, **{kind: round(float(row[questions.kinds == kind].mean()), 4) for kind in make.kinds}}
        for row in whole
    ]
    for entry in accuracy:
        entry["mean"] = round(float(np.mean([entry[kind] for kind in make.kinds])), 4)
    return {
        "miniature": make.name,
        "questions": len(questions.kinds),
        "questions_by_kind": {kind: int((questions.kinds == kind).sum()) for kind in make.kinds},
        "prompts": len(questions.strata),
        "seed": seed,
        "split": "held_out",
        "models": [
            {
                "name": subject.name,
                "digest": subject.digest,
                "accuracy": scores,
                "head_weights": w["weights"],
                "head_weights_of_all_layers": w["other_layers"]["all"]["weights"],
                "tasks": [task["name"] for task in w["tasks"]],
                "deltas": w["deltas"],
            }
            for subject, scores, w in zip(subjects, accuracy, weights, strict=True)
        ],
        "methods": summarise(questions, right, whole, HAWK, KEEP_RATIOS, resampling_weights(questions.strata)),
        "layers_read": {c.label: layers_read(c, _depth(subjects[0])) for c in contenders},
        "reference": HAWK,
        "refused": refused,
        "prefill_ms": prefill_times(subjects[0], contenders, weights_of_heads(weights[0])) if times else None,
        "prefill_keep_ratio": TIMED_RATIO,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _depth(subject: Subject) -> int:
    return int(subject.model.config.get_text_config().num_hidden_layers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = cli.parser("bench.tinyvqa.table", __doc__, seed=(SEED, "the questions"), threads=2)
    parser.add_argument("--miniature", choices=tuple(MAKES), default="qwen", help="whose models (default: qwen)")
    parser.add_argument(
        "--models", type=cli.checkpoint_folder, nargs="+", help="folders of other checkpoints, all of one make"
    )
    parser.add_argument(
        "--methods", choices=sorted(METHODS), nargs="+", help="those to compare, besides HAWK (default: all)"
    )
    parser.add_argument(
        "--out",
        type=cli.output_folder,
        help=f"where everything goes (default: {RESULTS}/MINIATURE)",
    )
    parser.add_argument(
        "--prompts", type=cli.whole_number(1), default=PROMPTS, help="two questions of each kind on each (default: 160)"
    )
    parser.add_argument("--no-times", action="store_true", help="leave out the time per prefill")
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    out = args.out or RESULTS / args.miniature
    models = args.models or MODELS[args.miniature]
    report = build(models, out, args.prompts, args.seed, not args.no_times, not args.no_progress, args.methods)
    (out / "table.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "table.md").write_text(markdown(report))
    draw_plot(report, out / "table.png")
    print(markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
