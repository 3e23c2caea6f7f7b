"""A benchmark in a JSONL file, with one question about pictures per line."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from hawk_kernels.tasks.scoring import METRICS, choice_index, multiple_choice
from hawk_kernels.tasks.task import Sample

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
"""The sentences that are appended to a question, without and with choices."""

_HEAD_BYTES = 4096


class JsonlTask:
    """A benchmark whose questions stand in a JSONL file, one object per line:

        {"image": "charts/1.png", "question": "How many bars?", "answer": "7"}

    `image` or `images`, `video` or `videos`: paths, seen from the file's folder. `answer` or `answers`: text or
    numbers. `choices`: a list of texts, of which `answer` names one by letter or text. `id`: names the sample, by
    default its line. `prompt`: what is asked word for word; without it the question is asked with a sentence appended
    that wants a short answer (`SHORT`) or a letter (`LETTER`). Other fields are left alone.

    Args:
        path: the file.
        metric: "exact", "relaxed" (numbers off by 5 %), "anls" or "choice"; by default "choice" where the first line
            has choices, else "exact".
        max_new_tokens: the longest answer.
        name: of the benchmark, by default the file's name without its end.
    """

    def __init__(
        self, path: str | Path, metric: str | None = None, *, max_new_tokens: int = 32, name: str | None = None
    ) -> None:
        known = (*METRICS, "choice")
        if metric is not None and metric not in known:
            raise ValueError(f"metric: expected one of {', '.join(known)}, got {metric!r}")
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"data: expected a JSONL file, got {str(path)!r}, which is no file; check the path")
        with self.path.open("rb") as file:
            if b"\0" in file.read(_HEAD_BYTES):
                raise ValueError(
                    f"data: expected a JSONL file of UTF-8 text, one JSON object a line, got {str(path)!r}, which is "
                    "not text; check the path"
                )
        self.name = name or self.path.stem
        self.max_new_tokens = max_new_tokens
        self._metric = metric

    @cached_property
    def _read(self) -> tuple[list[Sample], list[str]]:
        samples: list[Sample] = []
        problems: list[str] = []
        seen: dict[str, str] = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                origin = f"{self.path.name}:{number}"
                try:
                    # some editors begin a file with a byte order mark
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    sample = self._sample(json.loads(text), origin, str(number))
                except (ValueError, TypeError, OSError, RecursionError) as error:
                    problems.append(f"{origin}: {error}")
                    continue
                if sample.key in seen:
                    problems.append(f"{origin}: expected an id of its own, got {sample.key!r} as in {seen[sample.key]}")
                seen.setdefault(sample.key, origin)
                samples.append(sample)
        if self._metric is None and samples:
            wanted = "choices" in samples[0].details
            problems += [
                f"{sample.origin}: expected {'choices' if wanted else 'no choices'} as in {samples[0].origin}; one "
                "file is scored by one metric, so split it or name the metric"
                for sample in samples
                if ("choices" in sample.details) != wanted
            ]
        if not samples and not problems:
            problems.append(f"{self.path.name}: expected one question a line, got an empty file")
        return samples, problems

    @property
    def samples(self) -> list[Sample]:
        """The questions, in the order of the file; lines with a problem are left out."""
        return self._read[0]

    def problems(self) -> list[str]:
        """Say what is wrong with which line."""
        return self._read[1]

    @property
    def metric(self) -> str:
        """How answers are scored."""
        if self._metric is not None:
            return self._metric
        return "choice" if self.samples and self.samples[0].details.get("choices") else "exact"

    def prompt(self, sample: Sample) -> str:
        """Return the question, the choices and how to answer, or the line's own prompt."""
        if "prompt" in sample.details:
            return str(sample.details["prompt"])
        choices = sample.details.get("choices")
        if not choices:
            return f"{sample.question}\n{SHORT}"
        listed = "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))
        return f"{sample.question}\n{listed}\n{LETTER}"

    def score(self, sample: Sample, answer: str) -> float:
        """Score an answer by the file's metric."""
        if self.metric == "choice":
            return multiple_choice(answer, sample.answers, sample.details["choices"])
        return METRICS[self.metric](answer, sample.answers)

    def _sample(self, line: Any, origin: str, number: str) -> Sample:
        if not isinstance(line, dict):
            raise ValueError(f"expected a JSON object, got {type(line).__name__}")
        # tables write null for a missing field; half of a surrogate pair cannot be tokenised, and fails to encode here
        line = {name: value for name, value in line.items() if value is not None}
        json.dumps(line, ensure_ascii=False).encode()
        images, videos = self._files(line, "image"), self._files(line, "video")
        if not images and not videos:
            raise ValueError(
                f"expected 'image', 'images', 'video' or 'videos', got only {', '.join(line) or 'nothing'}"
            )
        question, prompt = line.get("question"), line.get("prompt")
        if not isinstance(question, str) and not isinstance(prompt, str):
            raise ValueError(f"expected 'question' to be text, got {question!r}")
        given = line.get("answers", line.get("answer"))
        entries = given if isinstance(given, list) else [given]
        if not entries or not all(isinstance(entry, (str, int, float)) for entry in entries):
            raise ValueError(f"expected 'answer' or 'answers' to be text or numbers, got {given!r}")
        answers = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
        details = {name: line[name] for name in ("choices", "prompt") if name in line}
        self._check_choices(details.get("choices"), answers)
        return Sample(
            key=str(line.get("id", number)),
            question=question if isinstance(question, str) else str(prompt),
            answers=tuple(answers),
            images=tuple(images),
            videos=tuple(videos),
            origin=origin,
            details=details,
        )

    def _files(self, line: dict[str, Any], kind: str) -> list[Path]:
        given = line.get(f"{kind}s", line.get(kind))
        if given is None:
            return []
        names = given if isinstance(given, list) else [given]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected '{kind}' to be a path, or '{kind}s' a list of paths, got {given!r}")
        paths = [self.path.parent / name for name in names]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"there is no file {', '.join(missing)}")
        return paths

    def _check_choices(self, choices: Any, answers: list[str]) -> None:
        if choices is None:
            if self._metric == "choice":
                raise ValueError("expected 'choices', a list of texts, for metric 'choice', got none")
            return
        if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
            raise ValueError(f"expected 'choices' to be a list of 2 to 26 texts, got {choices!r}")
        if not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"expected 'choices' to be texts, got {choices!r}")
        if self._metric in (None, "choice"):
            strange = [answer for answer in answers if choice_index(answer, choices) is None]
            if strange:
                raise ValueError(f"expected 'answer' to be a letter or the text of a choice, got {strange[0]!r}")
