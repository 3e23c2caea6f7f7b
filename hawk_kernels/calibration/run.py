"""Runs a calibration: scores benchmarks with the visual tokens masked from one attention head after the other."""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hawk_kernels.calibration.decoding import answers_with_masked_heads
from hawk_kernels.calibration.encoding import decode, encode
from hawk_kernels.calibration.journal import Journal, Key
from hawk_kernels.calibration.masking import LAYERS, attention_modules, hide_visual_tokens
from hawk_kernels.calibration.plan import Chosen, Question, check_pictures, choose_samples
from hawk_kernels.calibration.processes import Processes, is_first_process
from hawk_kernels.calibration.result import Calibration, check_same_model, check_target, layer_result, now, task_score
from hawk_kernels.calibration.task import Task
from hawk_kernels.head_weights import fingerprint
from hawk_kernels.hf.anatomy import Anatomy, dissect

BOTH = "both"
_DIGESTED = 64


def calibrate(
    model: nn.Module,
    tasks: Task | Sequence[Task],
    *,
    processor: Any = None,
    out: str | Path | None = None,
    layers: str = "first",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Calibration:
    """Measure how much each attention head matters for looking: the offline half of HAWK (arXiv 2604.07812).

    Every sample is answered once as it is and once for each head, with the visual tokens masked from that head alone
    (see `hide_visual_tokens`); the drops in score become weights (see `head_importance`). Answers are greedy.

        task = JsonlTask("chartqa.jsonl", "relaxed")
        calibration = hawk_kernels.calibrate(model, task, processor=processor, out="weights.json")
        with prune(model, 0.2, head_weights="weights.json"):
            ...

    With `out`, every finished sample is kept in the folder `OUT.journal` at once; the same call goes on where a killed
    one ended and gives the same result. Under `accelerate launch` or `torchrun` the processes share the samples.

    Args:
        model: a transformers model of a supported family, with attention "sdpa" or "eager".
        tasks: the benchmarks, see `hawk_kernels.calibration.Task`.
        processor: of the model; by default the one of its checkpoint.
        out: the weights file to write.
        layers: "first": heads of the layer whose queries and keys score the tokens; "all": head `i` of every layer at
            once (the paper does not say which); "both": measure both, of which "first" gives the weights.
        limit: at most so many samples of each task, drawn at random.
        seed: of that draw and of the bootstrap.
        batch_size: answers to one sample that are generated together; fewer where prompts are long.
        progress: whether to show progress and the time left on stderr.

    Returns:
        weights, standard errors, drops and scores; the same in every process.

    Warns:
        UserWarning: a benchmark has few samples, or the weights are no surer than their standard errors.

    Raises:
        TypeError: a model that is not supported.
        ValueError: an argument out of range, bad samples (each named), a journal of another calibration, a model whose
            logits are not finite, a benchmark on which it scores zero, or an `out` that must not be replaced.
    """
    chosen = choose_samples([tasks] if isinstance(tasks, Task) else list(tasks), limit, seed)
    check_pictures(chosen, progress and is_first_process())
    calibration = calibrate_chosen(
        model,
        chosen,
        processor=processor,
        out=out,
        layers=layers,
        settings={"seed": seed, "limit": limit},
        batch_size=batch_size,
        progress=progress,
    )
    if is_first_process():
        for doubt in calibration.doubts():
            warnings.warn(doubt, stacklevel=2)
    return calibration


def calibrate_chosen(
    model: nn.Module,
    chosen: Sequence[Chosen],
    *,
    processor: Any,
    out: str | Path | None,
    layers: str,
    settings: Mapping[str, Any],
    batch_size: int,
    progress: bool,
) -> Calibration:
    """Calibrate on samples that were chosen and checked before, for example before the model was loaded."""
    if layers not in (*LAYERS, BOTH):
        raise ValueError(f"layers: expected 'first', 'all' or 'both', got {layers!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least one answer at a time, got {batch_size}")
    if out is not None:
        check_target(out)
    modes = LAYERS if layers == BOTH else (layers,)
    anatomy = dissect(model)
    # a model that cannot be masked is refused before anything is measured
    hide_visual_tokens(model, [], layers=modes[0])
    processor = processor_of(model) if processor is None else processor
    with Processes() as processes:
        if processes.count > 1 and out is None:
            raise ValueError("out: expected a weights file, by whose journal the processes share their work, got None")
        plan = _plan(model, modes)
        shows = progress and processes.rank == 0
        with evaluating(model):
            measured = _measure(anatomy, processor, chosen, modes, batch_size, out, plan, processes, shows)
        calibration = _calibration(model, anatomy, chosen, modes, measured, plan, settings)
        if out is not None and processes.rank == 0:
            calibration.save(out)
        processes.wait()
    return calibration


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and leave its modules as they were."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


def _measure(
    anatomy: Anatomy,
    processor: Any,
    chosen: Sequence[Chosen],
    modes: Sequence[str],
    batch_size: int,
    out: str | Path | None,
    plan: Mapping[str, Any],
    processes: Processes,
    shows: bool,
) -> dict[Key, dict[str, Any]]:
    """Return the scores of every sample, from the journal or from the model."""
    from tqdm import tqdm

    questions = [question for part in chosen for question in part.questions]

    def measure_all(questions: Sequence[Question], add: Callable[[Key, dict[str, Any]], None], done: int) -> None:
        total = done + len(questions)
        for question in tqdm(questions, desc="calibrate", unit="sample", initial=done, total=total, disable=not shows):
            add(question.key, _scores(anatomy, processor, question, modes, batch_size))

    if out is None:
        found: dict[Key, dict[str, Any]] = {}
        measure_all(questions, found.__setitem__, 0)
        return found
    journal = Journal(Path(f"{out}.journal"), plan, processes.rank)
    finished = journal.read()
    check_same_model(out, plan["fingerprint"], plan["parameters"])
    left = [question for question in questions if question.key not in finished]
    # what all processes read is the same only as long as none of them adds to it
    processes.wait()
    with journal:
        done = (len(questions) - len(left)) // processes.count
        measure_all(left[processes.rank :: processes.count], journal.add, done)
    processes.wait()
    found = journal.read()
    missing = [question.place for question in questions if question.key not in found]
    if missing:
        raise ValueError(
            f"out: expected the journals of all processes in {out}.journal, but {len(missing)} samples are missing "
            f"({missing[0]}, ...); write to a folder that all machines share"
        )
    return found


def _scores(
    anatomy: Anatomy, processor: Any, question: Question, modes: Sequence[str], batch_size: int
) -> dict[str, Any]:
    """Score one sample as it is, and with the visual tokens masked from each head in each mode."""
    task, sample, place = question.task, question.sample, question.place
    heads = list(range(anatomy.projections.num_heads))
    with naming(place, "cannot be asked"):
        inputs = encode(task, sample, processor, anatomy.head)
    record: dict[str, Any] = {}
    for mode in modes:
        asked = [*([] if "base" in record else [None]), *heads]
        try:
            with naming(place, "cannot be answered"):
                tokens = answers_with_masked_heads(
                    anatomy, inputs, asked, layers=mode, max_new_tokens=task.max_new_tokens, batch_size=batch_size
                )
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"{place}: out of memory with batch_size={batch_size}; take a smaller one, what is finished is kept"
            ) from error
        answers = [decode(processor, row) for row in tokens]
        with naming(place, "cannot be scored"):
            scores = [checked_score(task.score(sample, answer)) for answer in answers]
        if "base" not in record:
            record |= {"answer": answers.pop(0), "base": scores.pop(0)}
        record[mode] = scores
    return record


@contextmanager
def naming(place: str, trouble: str) -> Iterator[None]:
    """Name the sample in an error that it causes, perhaps after hours."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise kind(f"{place}: {trouble}: {reason}") from error


def checked_score(score: Any) -> float:
    """Return the score of an answer as a float, or raise ValueError if a task's scorer gave something else."""
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(f"expected a score from 0 to 1, got {score!r}; look at the task's scorer")
    return value


def _calibration(
    model: Any,
    anatomy: Anatomy,
    chosen: Sequence[Chosen],
    modes: Sequence[str],
    measured: Mapping[Key, Mapping[str, Any]],
    plan: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Calibration:
    def of(part: Chosen, what: str) -> np.ndarray:
        return np.array([measured[question.key][what] for question in part.questions], dtype=np.float64)

    base = [of(part, "base") for part in chosen]
    for part, scores in zip(chosen, base, strict=True):
        _check_base(part, scores, measured)
    names = [part.task.name for part in chosen]
    text: Any = anatomy.text
    first = attention_modules(anatomy, "first")[0]
    return Calibration(
        model=_name(model),
        fingerprint=plan["fingerprint"],
        layer=next(i for i, layer in enumerate(text.layers) if getattr(layer, "self_attn", None) is first),
        tasks=tuple(
            task_score(part.task.name, part.total, part.digest, scores)
            for part, scores in zip(chosen, base, strict=True)
        ),
        results={
            mode: layer_result(names, base, [of(part, mode) for part in chosen], settings["seed"]) for mode in modes
        },
        settings={**settings, **{name: plan[name] for name in ("dtype", "attention", "device", "parameters")}},
        versions=plan["versions"],
        date=now(),
    )


def _check_base(part: Chosen, scores: np.ndarray, measured: Mapping[Key, Mapping[str, Any]]) -> None:
    """Refuse a benchmark that the model never answers right: no head can lose what is not there."""
    if scores.any():
        return
    question = part.questions[0]
    answers = ", ".join(map(repr, question.sample.answers[:3])) or "what its scorer wants"
    raise ValueError(
        f"{part.task.name}: expected a score above zero with nothing masked, got 0 on all {len(scores)} samples, which "
        f"says nothing about heads; look at the prompt, the answers and the metric: {question.place} was asked "
        f"{part.task.prompt(question.sample)!r} and answered {measured[question.key]['answer']!r} instead of {answers}"
    )


def _plan(model: Any, modes: Sequence[str]) -> dict[str, Any]:
    """Return what must be equal for scores of one run to be those of another."""
    import transformers

    import hawk_kernels

    text: Any = dissect(model).text
    return {
        "fingerprint": fingerprint(model.config),
        "parameters": parameters_digest(model),
        "layers": list(modes),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": text.config._attn_implementation,
        "device": model.device.type,
        "versions": {
            "hawk_kernels": hawk_kernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
        },
    }


def parameters_digest(model: nn.Module) -> str:
    """Hash some numbers of each parameter: a model that was trained further is another, whatever its config says."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        if parameter.device.type != "meta" and parameter.numel():
            flat = parameter.detach().flatten()
            part = flat[:: max(1, flat.numel() // _DIGESTED)][:_DIGESTED].to("cpu").contiguous()
            found.update(part.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _name(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def processor_of(model: Any) -> Any:
    """Load the processor of the checkpoint that a model came from."""
    from hawk_kernels.checkpoint import load_processor

    name = getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError(
            "processor: expected the model's processor, got None for a model without a checkpoint; pass it"
        )
    return load_processor(name)
