"""Runs an evaluation: asks every question unpruned and by every method at every keep ratio, one after the other."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawk_kernels.evaluation.contenders import (
    UNPRUNED,
    Contender,
    Way,
    check_contenders,
    naming_way,
    refusal,
)
from hawk_kernels.evaluation.output import check_folder, write_results
from hawk_kernels.evaluation.result import Evaluation, Record, TaskResult, summarise
from hawk_kernels.evaluation.stages import checked_keep
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.prune import KeepRatio
from hawk_kernels.hf.stats import PruningStats
from hawk_kernels.tasks.encoding import decode, encode, processor_of
from hawk_kernels.tasks.identity import identify, name_of, now
from hawk_kernels.tasks.journal import Key
from hawk_kernels.tasks.processes import Processes, is_first_process
from hawk_kernels.tasks.samples import Chosen, Question, check_pictures, choose_samples
from hawk_kernels.tasks.survey import Add, Survey, checked_score, evaluating, naming
from hawk_kernels.tasks.task import Task
from hawk_kernels.timed_generation import timed_generation

KEEP = (0.4, 0.2, 0.1)
JOURNAL = "journal"
_RECORDS = 2
"""Counts the changes of what a record holds; a journal of other records is refused."""


def evaluate(
    model: nn.Module,
    tasks: Task | Sequence[Task],
    *,
    methods: Sequence[str | Contender] = ("hawk",),
    keep: Sequence[KeepRatio] = KEEP,
    processor: Any = None,
    head_weights: Any = None,
    out: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Compare pruning methods on a model and its data: how much of the score each keeps, and what it saves.

    Every question is asked with nothing pruned and by each method at each keep ratio, one after the other, so that
    times can be compared. Answers are those of `generate` with the model's own generation config, without sampling.

        task = JsonlTask("chartqa.jsonl", "relaxed")
        evaluation = evaluate(model, task, methods=["hawk", "divprune", "fastv:layer=2"], processor=processor)
        print(evaluation.of("divprune", 0.2).relative)

    With `out`, every finished question is kept in the folder's journal at once; the same call goes on where a killed
    one stopped, and asks nothing twice when methods, keep ratios or tasks are added. Under `accelerate launch` or
    `torchrun` the processes share the questions.

    Args:
        model: a transformers model of a supported family.
        tasks: the benchmarks, see `hawk_kernels.tasks.Task`.
        methods: spelled "name" or "name:option=value,...", or `Contender` objects; the first is the one that the others
            are compared with. "name@2" chooses after layer 2. A recipe of `prune` is a name too.
        keep: keep ratios, floats in (0, 1], or numbers of visual tokens, or stages `{layer: keep}` as `prune` takes
            them; 1.0 stands for nothing pruned, which is always asked.
        processor: of the model; by default the one of its checkpoint.
        head_weights: for methods that use them and do not bring their own, as `prune` takes them.
        out: a folder for results.json, results.md, results.png (where matplotlib is installed) and report.html.
        limit: at most so many samples of each task, drawn at random.
        seed: of that draw.
        progress: whether to show progress and the time left on stderr.

    Returns:
        The results; the same in every process.

    Warns:
        UserWarning: a benchmark has few samples, or the model scores nothing on it.

    Raises:
        TypeError: a model that is not supported.
        ValueError: a method, an option or a keep ratio that does not exist, bad samples (each named), a journal of
            another model, no method that can serve the model, or an `out` whose files must not be replaced.
    """
    contenders = [Contender.from_text(method) if isinstance(method, str) else method for method in methods]
    check_contenders(contenders, checked_keeps(keep))
    chosen = choose_samples([tasks] if isinstance(tasks, Task) else list(tasks), limit, seed)
    check_pictures(chosen, progress and is_first_process())
    evaluation = evaluate_chosen(
        model,
        chosen,
        contenders=contenders,
        keep=keep,
        processor=processor,
        head_weights=head_weights,
        out=out,
        settings={"seed": seed, "limit": limit},
        progress=progress,
    )
    if is_first_process():
        for doubt in evaluation.doubts():
            warnings.warn(doubt, stacklevel=2)
    return evaluation


def evaluate_chosen(
    model: nn.Module,
    chosen: Sequence[Chosen],
    *,
    contenders: Sequence[Contender],
    keep: Sequence[KeepRatio],
    processor: Any,
    head_weights: Any,
    out: str | Path | None,
    settings: Mapping[str, Any],
    progress: bool,
) -> Evaluation:
    """Evaluate on samples that were chosen and checked before, for example before the model was loaded."""
    keeps = checked_keeps(keep)
    if out is not None:
        check_folder(out)
    anatomy = dissect(model)
    head = anatomy.head
    asker = _Asker(head, processor_of(model) if processor is None else processor)
    questions = [question for part in chosen for question in part.questions]
    given = [replace(contender, head_weights=head_weights) for contender in contenders]
    with Processes() as processes:
        if processes.count > 1 and out is None:
            raise ValueError("out: expected a folder, by whose journal the processes share their work, got None")
        plan = {**identify(model), "records": _RECORDS}
        with evaluating(head):
            every = [Way(contender, ratio) for contender in given for ratio in keeps]
            _check_arguments(head, every)
            refused = _refusals(asker, every, questions[0])
            ways = [way for way in every if way.label not in refused]
            if not ways:
                reasons = "; ".join(f"{label}: {reason}" for label, reason in refused.items())
                raise ValueError(f"methods: expected one that can serve the model, got none: {reasons}")
            folder = None if out is None else Path(out) / JOURNAL
            survey = Survey("evaluation", "evaluate", plan, folder, processes, progress and processes.rank == 0)
            keys = {way: way.key for way in (UNPRUNED, *ways)}

            def keys_of(question: Question) -> list[Key]:
                return [_key(question, key) for key in keys.values()]

            def measure(question: Question, wanted: Sequence[Key], add: Add) -> None:
                asked = {way: _key(question, key) for way, key in keys.items()}
                records = asker.ask_in_turn(question, [way for way, key in asked.items() if key in wanted])
                for way, key in asked.items():
                    if key in wanted:
                        add(key, records[way])

            found = survey.collect(questions, keys_of, measure)
        whole, *pruned = ([found[_key(question, key)] for question in questions] for key in keys.values())
        unpruned, results = summarise(
            [question.task.name for question in questions],
            [_group(question) for question in questions],
            whole,
            dict(zip(ways, pruned, strict=True)),
        )
        evaluation = Evaluation(
            model=name_of(head),
            tasks=tuple(_task_result(part, questions, whole) for part in chosen),
            unpruned=unpruned,
            methods=tuple(results),
            refused=refused,
            settings={**settings, **{name: plan[name] for name in ("dtype", "attention", "device", "parameters")}},
            versions=plan["versions"],
            date=now(),
        )
        if out is not None and processes.rank == 0:
            write_results(evaluation, out)
        processes.wait()
    return evaluation


def checked_keeps(keep: Sequence[KeepRatio]) -> list[KeepRatio]:
    """Return the keep ratios without 1.0, which stands for nothing pruned and is always asked.

    Raises:
        TypeError, ValueError: a keep ratio that `prune` does not take, one that comes twice, or none below 1.0.
    """
    keeps = [checked_keep(ratio) for ratio in keep]
    if len(set(map(repr, keeps))) < len(keeps):
        raise ValueError(f"keep: expected each keep ratio once, got {keeps}; leave out the copies")
    keeps = [ratio for ratio in keeps if not (isinstance(ratio, float) and ratio == 1)]
    if not keeps:
        raise ValueError("keep: expected a keep ratio below 1.0, got none; 1.0 stands for nothing pruned")
    return keeps


class _Asker:
    """Asks questions of a model and scores its answers.

    Args:
        model: in eval mode, with `generate`.
        processor: of the model.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self._processor = model, processor
        config = model.generation_config
        ends = config.eos_token_id
        end = ends[0] if isinstance(ends, list) and ends else ends
        # otherwise every call of generate logs which one it takes
        self._options = {} if config.pad_token_id is not None or end is None else {"pad_token_id": end}

    def encoded(self, question: Question) -> dict[str, Any]:
        """Return the model's inputs."""
        with naming(question.place, "cannot be asked"):
            inputs = encode(question.task, question.sample, self._processor, self.model)
            if inputs["input_ids"].shape[0] != 1:
                raise ValueError(
                    f"inputs: expected one prompt, batch size 1, got {inputs['input_ids'].shape[0]}; encode the "
                    "samples singly"
                )
        return inputs

    @torch.no_grad()
    def first_token(self, inputs: Mapping[str, Any]) -> None:
        """Generate one token, to see whether it can be done and to warm up."""
        self.model.generate(**inputs, **self._options, do_sample=False, num_beams=1, max_new_tokens=1)

    def ask_in_turn(self, question: Question, ways: Sequence[Way]) -> dict[Way, Record]:
        """Ask a question in each way, and with nothing pruned, whose times are noted beside those of each way.

        Who begins changes from question to question, so that no way always comes after the same other one.
        """
        inputs = self.encoded(question)
        turn = list(dict.fromkeys((UNPRUNED, *ways)))
        begin = int(question.digest, 16) % len(turn)
        try:
            with naming(question.place, "cannot be answered"):
                records = {way: self._ask(question, inputs, way) for way in (*turn[begin:], *turn[:begin])}
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"{question.place}: out of memory; take a smaller dtype or another device, what is finished is kept"
            ) from error
        with naming(question.place, "cannot be scored"):
            for record in records.values():
                record["score"] = checked_score(question.task.score(question.sample, record["answer"]))
        beside = {name: records[UNPRUNED][name] for name in ("first_token", "next_token")}
        return {way: record if way is UNPRUNED else {**record, "beside": beside} for way, record in records.items()}

    @torch.no_grad()
    def _ask(self, question: Question, inputs: Mapping[str, Any], way: Way) -> dict[str, Any]:
        length = question.task.max_new_tokens
        with way.block(self.model) as pruning:
            timed = timed_generation(self.model, inputs, max_new_tokens=length, **self._options)
        record = {
            "answer": decode(self._processor, timed.sequences[0, inputs["input_ids"].shape[1] :].tolist()),
            "cache_bytes": timed.prompt_bytes,
            "first_token": timed.first_token,
            "next_token": timed.next_token,
        }
        return record if pruning is None else {**record, **_pruned(pruning.stats)}


def _pruned(stats: PruningStats) -> dict[str, Any]:
    """Return what the record of a pruned question holds beside that of an unpruned one."""
    by_layer = [sample.visual_tokens_by_layer for sample in stats.samples]
    return {
        "visual_tokens_before": sum(sample.visual_tokens_before for sample in stats.samples),
        "visual_tokens_after": sum(sample.visual_tokens_after for sample in stats.samples),
        "tokens_per_layer": sum(math.fsum(layers) / len(layers) for layers in by_layer),
        "layers": [stage.layer for stage in stats.stages],
        "options": stats.method_options,
    }


def _check_arguments(model: Any, ways: Sequence[Way]) -> None:
    """Refuse what `prune` refuses, before anything is asked; `_refusals` finds methods that do not suit the family."""
    for way in ways:
        with naming_way(way):
            way.block(model)


def _refusals(asker: _Asker, ways: Sequence[Way], question: Question) -> dict[str, str]:
    """Try each method, and in each kind of stages, on one question; return the reason for each that cannot serve."""
    inputs = asker.encoded(question)
    with naming(question.place, "cannot be answered"):
        asker.first_token(inputs)
    reasons: dict[str, str | None] = {}
    for way in ways:
        if way.label not in reasons:
            with naming(question.place, f"cannot be answered by {way.label}"):
                reasons[way.label] = refusal(way, asker.model, lambda: asker.first_token(inputs))
    return {label: reason for label, reason in reasons.items() if reason is not None}


def _group(question: Question) -> str:
    """Return what is the same for questions about the same pictures."""
    return question.pictures or "\n".join(question.key)


def _key(question: Question, way: str) -> Key:
    task, sample, digest = question.key
    return task, sample, json.dumps([digest, way])


def _task_result(part: Chosen, questions: Sequence[Question], whole: Sequence[Record]) -> TaskResult:
    asked = zip(questions, whole, strict=True)
    scores = [record["score"] for question, record in asked if question.task is part.task]
    pictures = len({_group(question) for question in part.questions})
    return TaskResult(part.task.name, len(scores), part.total, pictures, part.digest, math.fsum(scores) / len(scores))
