"""Runs a case with pruning and without, where the dropped tokens are hidden, and says what differs.

Tokens that leave before the first layer are hidden by the caller's mask, at their own positions. Where a layer sees
masked tokens all the same (linear attention, convolutions), a text model that never got them stands for that. Tokens
that leave inside the stack are hidden by `mode="hide"`, whose masks other tests compare with layers that never got
them. Where a method merges, the unpruned text model is given the sums that the pruned one read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.families import VISUAL_FEATURES
from hawk_kernels.methods import METHODS, resolve_method
from hawk_kernels.selection import kept_count
from tests.family_checks import expected_logits, packed_positions, removed, together, watched
from tests.hostile.cases import GENERATING, Case, hidden_tokens, inputs_of
from tests.hostile.refusals import refusal_of
from tests.test_method_fastv import without_tokens
from tests.tiny_families import BY_NAME, tiny_model
from tests.tiny_models import FIRST_WORD, IMAGE, VIDEO, VOCABULARY

TOLERANCE = 1e-4
NEW_TOKENS = 4
GREEDY = {
    "do_sample": False,
    "suppress_tokens": list(range(FIRST_WORD)),
    "eos_token_id": VOCABULARY + 1,
    "max_new_tokens": NEW_TOKENS,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "return sequences": {"num_beams": 2, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "use_cache=False": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}
"""Arguments of `generate`, by mode."""

KEPT_BY_UPSTREAM = {"rope_deltas", "_compiled_call", "_previous_max_cache_length"}
MERGING = ("visionzip", "prumerge", "vscan")
"""Methods whose kept tokens are sums before the first layer; SparseVLM's recycling merges inside the stack."""
SAME_AS_GREEDY = ("static cache", "use_cache=False", "prompt lookup", "assisted")
FORWARD = ("forward", "forward without a cache")
LABELS = {"labels", "gradient"}


class Verdict(NamedTuple):
    """What came of a case.

    Attributes:
        kind: "passed", "refused", "upstream" (the unpruned model does not run it, or has it wrong, or scores are
            equal but for rounding, so that there is nothing to compare with) or "failed".
        what: the reason of a refusal, or what is wrong.
    """

    kind: str
    what: str = ""


class WrongError(Exception):
    """A result that is not what it should be."""


class UnprunedError(Exception):
    """The unpruned model does not run a case, or has it wrong."""


class Run(NamedTuple):
    """What a call gave.

    Attributes:
        values: tensors that must be those of the unpruned model: logits `[B, T, V]`, or tokens.
        keep_mask: bool `[B, T]`, what stayed.
        gradients: of the weights, by name.
        loss: of the labels.
        scores: float32 `[B, T]`, of the visual tokens.
    """

    values: list[torch.Tensor]
    keep_mask: torch.Tensor
    gradients: dict[str, torch.Tensor] = {}  # noqa: RUF012
    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None


def verdict_of(case: Case) -> Verdict:
    """Run a case and judge it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _Trial(case).verdict()
        except WrongError as wrong:
            return Verdict("failed", str(wrong))
        except UnprunedError as reason:
            return Verdict("upstream", str(reason))


@lru_cache(maxsize=3)
def _model(family: str, attention: str, seed: int = 0) -> nn.Module:
    return tiny_model(family, seed=seed, attention=attention or None)


class _Trial:
    """One case with its model and its inputs.

    Attributes:
        hides: whether a mask hides tokens from every layer of the model.
        always: arguments of every `generate`.
    """

    def __init__(self, case: Case) -> None:
        self.always: dict[str, Any] = {}
        self.case, self.hides = case, BY_NAME[case.family].hides
        self.model = _model(case.family, case.attention)
        self.generates = case.mode in GENERATING and case.mode != "second turn"
        with torch.no_grad(), _or_upstream():
            inputs = inputs_of(case)
            # some families count positions another way without a mask
            omits_mask = case.padding == "none" and bool(inputs["attention_mask"].all())
            given = {name: value for name, value in inputs.items() if name != "attention_mask" or not omits_mask}
            # generate counts positions from the first token, a forward without position ids from the first column
            read = self._generate if self.generates else lambda inputs: self.model(**inputs)
            _, self.embeds, positions = watched(self.model, lambda: read(given))
        self.positions, self.raw = positions, inputs
        hidden = hidden_tokens(case, inputs)
        self.visible = inputs["attention_mask"].bool() & ~hidden
        self.visual = ((inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)) & self.visible
        self.inputs = {**inputs, "attention_mask": self.visible.to(getattr(torch, case.mask))}
        if omits_mask:
            del self.inputs["attention_mask"]
        if bool(hidden.any()):
            self.inputs["position_ids"] = self._positions_of_caller()
        self.stages = {layer: (method, keep) for layer, method, keep in case.stages} or None
        self.merges = any(name in MERGING for name in case.methods)
        self.in_stack = bool(self.stages) or self._chooses_in_stack()

    def _chooses_in_stack(self) -> bool:
        """Tell whether the method of a case without named stages drops tokens after some layer."""
        depth = len(dissect(self.model).text.layers)
        # a method that needs more layers than one refuses such a model
        stages = resolve_method(self.case.method, dict(self.case.options)).stages(self.case.keep, max(2, depth))
        return any(stages)

    def verdict(self) -> Verdict:
        """Compare, and look for what the block left behind."""
        with _or_upstream():
            before = self._plain()
        traces = _traces(self.model)
        try:
            pruned = self._pruned()
        except WrongError:
            raise
        except Exception as error:
            self._check_left_alone(traces, before)
            reason = refusal_of(error)
            if reason is None:
                self._raise_if_upstream_fails_too()
                raise WrongError(f"{type(error).__name__}: {str(error)[:300]}") from error
            return Verdict("refused", reason)
        self._check_left_alone(traces, before)
        if pruned.keep_mask is None and not self.visual.any():
            return Verdict("passed")
        try:
            self._check_masks(pruned.keep_mask)
            self._compare(pruned, self._expected(pruned))
        except WrongError:
            self._raise_if_upstream_is_wrong_too()
            raise
        return Verdict("passed")

    def _pruned(self, mode: str | None = None) -> Run:
        if self.stages is not None:
            kept, options = self.stages, {"method": self.case.method}
        else:
            kept, options = self.case.keep, {"method": self.case.method, **self.case.options}
        if any(METHODS[name].uses_head_weights for name in self.case.methods):
            options["head_weights"] = "uniform"
        with prune(self.model, kept, budget=self.case.budget, query=self._query(), mode=mode, **options) as pruning:
            run = self._read(lambda: pruning.keep_mask)
            return run._replace(scores=pruning.scores)

    def _read(self, keep_mask: Callable[[], torch.Tensor]) -> Run:
        """Do what the mode of the case says."""
        mode, model = self.case.mode, self.model
        if mode == "threads":
            return self._in_threads(keep_mask)
        if mode == "chat":
            return self._in_chat(keep_mask)
        if self.generates:
            torch.manual_seed(self.case.seed)
            with torch.no_grad():
                said = self._generate(self.inputs, **self._options())
            return Run([said], keep_mask())
        if mode in LABELS:
            return self._with_gradient(self.inputs, keep_mask)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            caches = {} if mode != "forward without a cache" else {"use_cache": False}
            output = model(**self.inputs, **caches)
            kept = keep_mask()
            if mode != "second turn":
                return Run([output.logits], kept)
            valid = self.visible.long()
            following = self._next_turn()
            mask = torch.cat([valid, torch.ones_like(following)], dim=1)
            if "attention_mask" not in self.inputs:
                mask = None
            again = model(
                input_ids=following, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True
            )
            return Run([output.logits, again.logits], kept)

    @torch.no_grad()
    def _in_chat(self, keep_mask: Callable[[], torch.Tensor]) -> Run:
        """Generate, and once more with the whole conversation over the cache that was kept."""
        cache = transformers.DynamicCache(config=self.model.config.get_text_config())
        said = self._generate(self.inputs, past_key_values=cache)
        kept = keep_mask()
        conversation = torch.cat([said, self._next_turn()], dim=1)
        mask = torch.ones_like(conversation)
        mask[:, : self.visible.shape[1]] = self.visible
        again = self._generate({"input_ids": conversation, "attention_mask": mask}, past_key_values=cache)
        return Run([said, again], kept)

    def _whole_chat(self, kept: torch.Tensor) -> Run:
        """The same from two prompts that are read whole."""
        length = self.visible.shape[1]
        prompt = {**self.raw, "attention_mask": kept.long(), "position_ids": self._positions_of_caller()}
        said = self._generate(prompt)
        following = torch.cat([said[:, length:], self._next_turn()], dim=1)
        positions, steps = prompt["position_ids"], 1 + torch.arange(following.shape[1])
        more = positions[..., -1:].expand(*positions.shape[:-2], len(said), 1) + steps
        conversation = {
            name: torch.cat([value, torch.zeros_like(following, dtype=value.dtype)], dim=1)
            if value.shape == kept.shape
            else value
            for name, value in self.raw.items()
        }
        conversation |= {
            "input_ids": torch.cat([said[:, :length], following], dim=1),
            "attention_mask": torch.cat([kept.long(), torch.ones_like(following)], dim=1),
            "position_ids": torch.cat([positions.expand(more.shape[:-1] + (length,)), more], dim=-1),
        }
        return Run([said, self._generate(conversation)], kept)

    def _in_threads(self, keep_mask: Callable[[], torch.Tensor]) -> Run:
        requests = [self.inputs, self.inputs]
        with torch.no_grad():
            alone = self._generate(self.inputs)
            kept = keep_mask()
            said = together(self.model, requests)
        if not all(each is not None and torch.equal(each, alone) for each in said):
            raise WrongError("two requests at once say other tokens than one")
        return Run([alone], kept)

    def _with_gradient(self, inputs: dict[str, Any], keep_mask: Callable[[], torch.Tensor]) -> Run:
        model = self.model
        model.zero_grad(set_to_none=True)
        try:
            if self.case.mode == "labels":
                with torch.no_grad():
                    model(**inputs)
                kept = keep_mask()
                labels = self._labels(kept)
                with torch.no_grad():
                    output = model(**inputs, labels=labels)
                return Run([output.logits.detach()], kept, loss=output.loss.detach())
            logits = model(**inputs).logits
            kept = keep_mask()
            logits[kept].square().mean().backward()
            # embeddings and what follows them; the encoder is upstream's alone
            weights = dissect(model).text.named_parameters()
            gradients = {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}
            return Run([logits.detach()], kept, gradients)
        finally:
            model.zero_grad(set_to_none=True)

    def _labels(self, kept: torch.Tensor) -> torch.Tensor:
        """Labels of text that a kept token predicts."""
        predicted = kept & ~self.visual & torch.nn.functional.pad(kept[:, :-1], (1, 0))
        return torch.where(predicted, self.raw["input_ids"], -100)

    def _expected(self, pruned: Run) -> Run:
        """The same of a model that reads the prompt with the dropped tokens hidden."""
        if self.in_stack:
            if not self.hides:
                return self._expected_without_a_cache(pruned)
            return self._pruned(mode="hide")
        with self._giving_sums(pruned.keep_mask) if self.merges else _nothing(), torch.no_grad(), _or_upstream():
            return self._hidden(self._kept_of_rows(pruned.keep_mask))

    def _hidden(self, kept: torch.Tensor) -> Run:
        mode, model, case = self.case.mode, self.model, self.case
        positions = self.positions
        if mode == "chat":
            return self._whole_chat(kept)
        of_caller = {**self.raw, "attention_mask": kept.long()}
        if self.generates:
            if self.hides:
                of_caller["position_ids"] = positions - BY_NAME[case.family].first_position
                torch.manual_seed(case.seed)
                return Run([self._generate(of_caller, **self._options(oracle=True))], kept)
            return Run([self._generated_without(kept)], kept)
        of_caller["position_ids"] = positions
        if not self.hides:
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                whole = expected_logits(case.family, model, self.raw, kept, self.embeds, positions)
            return Run([whole], kept, loss=self._loss(whole, kept))
        if mode == "gradient":
            with torch.enable_grad():
                return self._with_gradient(of_caller, lambda: kept)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            if mode != "second turn":
                logits = model(**of_caller).logits
                return Run([logits], kept, loss=self._loss(logits, kept))
            output = model(**of_caller, use_cache=True)
            following = self._next_turn()
            steps = 1 + torch.arange(following.shape[1])
            again = model(
                input_ids=following,
                attention_mask=torch.cat([kept.long(), torch.ones_like(following)], dim=1),
                position_ids=positions[..., -1:] + steps,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            return Run([output.logits, again.logits], kept)

    def _generated_without(self, kept: torch.Tensor) -> torch.Tensor:
        """What a model says that never got the dropped tokens, which takes them row by row, or one row alone."""
        case, length = self.case, self.raw["input_ids"].shape[1]
        if case.mode in ("greedy", "threads"):
            rows = removed(self.model, self.embeds, self.positions, kept, steps=NEW_TOKENS)
            said = torch.stack([tokens for _, tokens in rows])
            return torch.cat([self.raw["input_ids"], said], dim=1)
        without = {
            "inputs_embeds": self.embeds[:, kept[0]],
            "attention_mask": torch.ones(1, int(kept.sum()), dtype=torch.long),
            "position_ids": packed_positions(self.positions, kept),
        }
        torch.manual_seed(case.seed)
        said = self._generate(without, **self._options(oracle=True))
        return torch.cat([self.raw["input_ids"].expand(len(said), length), said], dim=1)

    def _expected_without_a_cache(self, pruned: Run) -> Run:
        """Where no token can be hidden: layers that never get one, or a generation that reads all at every step."""
        if not self.generates:
            stages = self.case.stages
            if len(stages) != 1 or stages[0][0] == 0 or len(self.visible) > 1 or self.case.mode not in FORWARD:
                return pruned
            with torch.no_grad(), without_tokens(self.model, stages[0][0], pruned.keep_mask[0]):
                return Run([self.model(**self.raw, use_cache=False).logits], pruned.keep_mask)
        trial = object.__new__(_Trial)
        vars(trial).update(vars(self), always={"use_cache": False})
        if self.case.mode in SAME_AS_GREEDY:
            trial.case = replace(self.case, mode="greedy")
        return trial._pruned()

    @contextmanager
    def _giving_sums(self, kept: torch.Tensor) -> Iterator[None]:
        """Let the text model of the unpruned model read, at kept tokens, what that of the pruned one reads."""
        case = self.case
        seen: list[dict[str, Any]] = []
        text = dissect(self.model).text

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not seen:
                seen.append(kwargs)

        options = {"method": case.method, **case.options}
        if any(METHODS[name].uses_head_weights for name in case.methods):
            options["head_weights"] = "uniform"
        with torch.no_grad(), prune(self.model, case.keep, budget=case.budget, query=self._query(), **options):
            handle = text.register_forward_pre_hook(look, with_kwargs=True)
            try:
                self.model(**self.inputs)
            finally:
                handle.remove()
        sums = seen[0]
        of_rows = self._kept_of_rows(kept)
        whole = self.embeds.clone()
        for row, stays in enumerate(of_rows):
            count = int(stays.sum())
            whole[row, stays] = sums["inputs_embeds"][row, sums["inputs_embeds"].shape[1] - count :]
        length = whole.shape[1]

        def give(module: nn.Module, args: Any, kwargs: Any) -> Any:
            embeds = kwargs.get("inputs_embeds")
            if embeds is None or embeds.shape[1] < length:
                return None
            given, times = embeds.clone(), len(embeds) // len(whole)
            given[:, :length] = whole.repeat_interleave(times, dim=0)
            changed = {"inputs_embeds": given}
            for name in VISUAL_FEATURES:
                if kwargs.get(name) is not None:
                    changed[name] = [
                        self._with_features(features, merged, of_rows, times)
                        for features, merged in zip(kwargs[name], sums[name], strict=True)
                    ]
            return args, {**kwargs, **changed}

        handle = text.register_forward_pre_hook(give, with_kwargs=True)
        # rows without their dropped tokens are made of these
        own, self.embeds = self.embeds, whole
        try:
            yield
        finally:
            handle.remove()
            self.embeds = own

    def _with_features(
        self, features: torch.Tensor, merged: torch.Tensor, kept: torch.Tensor, times: int
    ) -> torch.Tensor:
        """Features `[S, C]` of all visual tokens with those of the kept ones replaced; rows come `times` times."""
        counts = [int((stays & visual).sum()) for stays, visual in zip(kept, self.visual, strict=True)]
        rows = [part for part in merged.split(counts) for _ in range(times)]
        found = features.clone()
        found[(kept.repeat_interleave(times, dim=0))[self.visual.repeat_interleave(times, dim=0)]] = torch.cat(rows)
        return found

    def _compare(self, pruned: Run, expected: Run) -> None:
        kept = self._kept_of_rows(pruned.keep_mask)
        if self.in_stack and not torch.equal(pruned.keep_mask, expected.keep_mask):
            at_issue = pruned.scores[pruned.keep_mask ^ expected.keep_mask]
            if float(at_issue.max() - at_issue.min()) <= 1e-5 * float(at_issue.abs().max()):
                raise UnprunedError(f"scores of {self.case.methods[-1]} tie but for rounding")
            raise WrongError("dropping and hiding keep other tokens")
        for number, (got, right) in enumerate(zip(pruned.values, expected.values, strict=True)):
            if got.shape != right.shape:
                raise WrongError(f"shape {list(got.shape)} in place of {list(right.shape)}")
            if not got.is_floating_point():
                if not torch.equal(got, right):
                    raise WrongError(
                        f"other tokens: {got[:, -NEW_TOKENS:].tolist()}, not {right[:, -NEW_TOKENS:].tolist()}"
                    )
                continue
            marked = kept if number == 0 else torch.ones(got.shape[:2], dtype=torch.bool)
            self._compare_logits(got[marked].float(), right[marked].float(), kept)
        for one, other in ((pruned.loss, expected.loss),):
            if one is not None and other is not None and not torch.allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE):
                raise WrongError(f"the loss is {one.item():.6f}, not {other.item():.6f}")
        for name, right in expected.gradients.items():
            if self.merges and "embed_tokens" in name:
                # the sums that the oracle is given come from no embedding
                continue
            got = pruned.gradients.get(name)
            if got is None or (got - right).abs().max() > TOLERANCE * max(1.0, float(right.abs().max())):
                raise WrongError(f"another gradient of {name}")

    def _compare_logits(self, got: torch.Tensor, right: torch.Tensor, kept: torch.Tensor) -> None:
        if not got.isfinite().all():
            raise WrongError("logits of kept tokens are not finite")
        if not got.numel():
            return
        if self.case.mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                whole = self._plain()[0][kept].float()
            error, scale = (got - right).abs().mean(), right.abs().mean()
            moved = (got - whole).abs().mean()
            # off by rounding, where dropping tokens moves much more
            if error > 0.1 * scale and error > 0.3 * moved:
                raise WrongError(f"logits are off by {float(error):.3g} on average, their size is {float(scale):.3g}")
            return
        error = float((got - right).abs().max())
        if error > TOLERANCE:
            raise WrongError(f"logits of kept tokens are off by {error:.3g}")

    def _check_masks(self, keep_mask: torch.Tensor) -> None:
        """Text stays, nothing hidden stays, and as many visual tokens as the budget says."""
        if keep_mask is None:
            raise WrongError("nothing was pruned and nothing said")
        kept = self._kept_of_rows(keep_mask)
        if not torch.equal(kept & ~self.visual, self.visible & ~self.visual):
            raise WrongError("text or padding changed sides")
        case = self.case
        method, keep = (case.method, case.keep) if not case.stages else case.stages[-1][1:]
        options = {} if case.stages else case.options
        chosen = resolve_method(method, options)
        rounding = getattr(chosen, "rounding", "floor")
        if chosen.reads_encoder():
            # what it reads tells it which placeholders only separate visual tokens, and these do not count
            return
        counts, before = (kept & self.visual).sum(1).tolist(), self.visual.sum(1).tolist()
        if case.budget == "shared":
            right = [kept_count(keep, count, rounding) for count in before]
            if method in ("pyramiddrop", "sparsevlm") or case.stages:
                # an earlier stage may have fewer left than a later one may keep
                right = [min(one, other) for one, other in zip(right, before, strict=True)]
            if counts != right:
                raise WrongError(f"{counts} visual tokens of {before} stay, not {right}")
        elif any((count == 0) != (left == 0) for count, left in zip(before, counts, strict=True)):
            raise WrongError(f"{counts} visual tokens of {before} stay")

    def _check_left_alone(self, traces: Any, before: list[torch.Tensor]) -> None:
        if _traces(self.model) != traces:
            old, new = dict(traces), dict(_traces(self.model))
            changed = [name for name in {**old, **new} if new.get(name) != old.get(name)]
            raise WrongError(f"the block left something on {', '.join(changed[:3])}")
        if not all(torch.equal(*pair) for pair in zip(self._plain(), before, strict=True)):
            raise WrongError("the model has other logits after the block")

    def _plain(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self.model(**self.raw).logits]

    def _raise_if_upstream_fails_too(self) -> None:
        with _or_upstream():
            self._read(lambda: self.visible)

    @torch.no_grad()
    def _raise_if_upstream_is_wrong_too(self) -> None:
        """The unpruned model may give the beams of a sample the features of others, or say other tokens in a mode."""
        if not self.generates or self.case.mode == "threads":
            return
        with _or_upstream():
            if self.case.mode == "chat":
                kept_cache, whole = self._in_chat(lambda: self.visible), self._whole_chat(self.visible)
                if not all(torch.equal(*pair) for pair in zip(kept_cache.values, whole.values, strict=True)):
                    raise UnprunedError("other tokens over a kept cache than of the whole conversation")
                return
            said, embeds, _ = watched(self.model, lambda: self._generate(self.inputs, **self._options()))
            beams = embeds.unflatten(0, (len(self.visible), -1))
            if not torch.allclose(beams, self.embeds.unsqueeze(1).expand_as(beams), atol=1e-3):
                raise UnprunedError("the beams of a sample get features of other images")
            if self.case.mode in SAME_AS_GREEDY and not torch.equal(said, self._generate(self.inputs)):
                raise UnprunedError("other tokens than those of greedy generation")

    def _kept_of_rows(self, keep_mask: torch.Tensor) -> torch.Tensor:
        """One row for each prompt; `generate` repeats them for its beams."""
        of_beams = keep_mask.unflatten(0, (len(self.visible), -1))
        if not torch.equal(of_beams, of_beams[:, :1].expand_as(of_beams)):
            raise WrongError("the beams of a sample keep other tokens")
        return of_beams[:, 0]

    def _positions_of_caller(self) -> torch.Tensor:
        return self.positions - (BY_NAME[self.case.family].first_position if self.generates else 0)

    def _query(self) -> Any:
        if not self.case.query:
            return None
        text = self.visible & ~self.visual & (self.raw["input_ids"] >= FIRST_WORD)
        marked = text & (text.flip(1).cumsum(1).flip(1) <= 5)
        if self.case.query == "mask":
            return marked
        return lambda ids: marked.repeat_interleave(len(ids) // len(marked), dim=0)

    def _next_turn(self) -> torch.Tensor:
        return torch.arange(FIRST_WORD, FIRST_WORD + 3).repeat(len(self.visible), 1)

    def _loss(self, logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor | None:
        if self.case.mode != "labels":
            return None
        labels = self._labels(kept)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    def _options(self, oracle: bool = False) -> dict[str, Any]:
        if self.case.mode == "assisted":
            # proposals change no token
            return {} if oracle else {"assistant_model": _model(self.case.family, "", 1)}
        return OPTIONS.get(self.case.mode, {})

    def _generate(self, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
        return self.model.generate(**{**inputs, **GREEDY, **options, **self.always})


def _traces(model: nn.Module) -> list[tuple[str, Any]]:
    """What hangs on each module: its hooks, and the names of its attributes without what upstream keeps there."""
    return [
        (
            name or "the model",
            (
                list(module._forward_pre_hooks),
                list(module._forward_hooks),
                sorted(vars(module).keys() - KEPT_BY_UPSTREAM),
            ),
        )
        for name, module in model.named_modules()
    ]


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _or_upstream() -> Iterator[None]:
    """What the unpruned model raises is no finding."""
    try:
        yield
    except (WrongError, UnprunedError):
        raise
    except Exception as error:
        raise UnprunedError(f"{type(error).__name__}: {str(error)[:160]}") from error
