"""What every mode of a family must satisfy, and whether the unpruned model has that mode at all.

Removing tokens equals hiding them. Where a layer sees masked tokens all the same (linear attention, convolutions),
removing is compared to a text model that never got them, row by row.
"""

import copy
import tempfile
import threading
from functools import lru_cache

import pytest
import torch
import torch._dynamo
import transformers

from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.families import FAMILIES
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import BEGIN, END_OF_TURN, FIRST_WORD, IMAGE, VOCABULARY, Picture, question, words

SUPPORTED = {family.model_type: family for family in FAMILIES}
VERSION, NEWEST = tuple(map(int, transformers.__version__.split(".")[:2])), (5, 23)
TOLERANCE = 1e-4
NEW_TOKENS = 4
# only ordinary words, so that no generated placeholder is taken for an image
GREEDY = {"do_sample": False, "suppress_tokens": list(range(FIRST_WORD)), "eos_token_id": VOCABULARY + 1}


def needs(name):
    """Skip a family that is tested from a later transformers on."""
    since = SUPPORTED[name].since
    if tuple(map(int, since.split("."))) > VERSION:
        pytest.skip(f"{name} is tested from transformers {since} on")
    assert name in transformers.CONFIG_MAPPING


@lru_cache(maxsize=1)
def model_of(name):
    return tiny_model(name)


@lru_cache(maxsize=1)
def assistant_of(name):
    return tiny_model(name, seed=1)


def prompts(name):
    """Prompts of a family, by the mode that they are an example of."""
    family = BY_NAME[name]
    one, other = (family.picture or size for size in (Picture(3, 3), Picture(2, 3)))
    video = question(Picture(2, 3, frames=6))
    return {
        "one image": [question(one)],
        "several images": [question([one, other])],
        "padded batch": [question([one, other]), question(other, seed=3, after=2)],
        "text rows": [question(one), [BEGIN, *words(7), END_OF_TURN, *words(2)]],
        # where frames are marked as images a batch has the one or the other
        "video": [video] if family.video_token == IMAGE else [video, question(one, seed=2, after=3)],
    }


def example(name, prompt):
    """The model of a family with the inputs of one of its prompts."""
    return model_of(name), batch(name, *prompts(name)[prompt])


def in_dtype(inputs, dtype):
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def watched(model, call):
    """What reaches the text model first in `call`: its embeddings and position ids."""
    seen = []

    def look(module, args, kwargs):
        if not seen and kwargs.get("inputs_embeds") is not None:
            embeds, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
            seen.extend([embeds, torch.arange(embeds.shape[1])[None] if positions is None else positions])

    hook = dissect(model).text.register_forward_pre_hook(look, with_kwargs=True)
    try:
        output = call()
    finally:
        hook.remove()
    return output, *seen


def generate(model, inputs, **options):
    return model.generate(**{**inputs, **GREEDY, "max_new_tokens": NEW_TOKENS, **options})


def pruned_by(model, **options):
    return prune(model, **{"keep_ratio": 0.3, "head_weights": "uniform", **options})


def packed_positions(positions, kept):
    """Position ids of the kept tokens of one row; of four rows of positions the first must have no gaps."""
    packed = positions[..., kept[0]]
    if packed.dim() == 3 and packed.shape[0] == 4:
        packed = torch.cat([torch.arange(packed.shape[-1]).expand(1, 1, -1), packed[1:]])
    return packed


def removed(model, embeds, positions, keep_mask, steps):
    """Logits and greedy tokens of the text model for the kept tokens alone, row by row."""
    text, head = dissect(model).text, model.get_output_embeddings()
    for row, kept in enumerate(keep_mask):
        of_row = positions.expand(*positions.shape[:-2], len(keep_mask), -1)[..., row : row + 1, :]
        output = text(
            inputs_embeds=embeds[row : row + 1, kept], position_ids=packed_positions(of_row, kept[None]), use_cache=True
        )
        logits, following, said = head(output.last_hidden_state)[0], of_row[..., -1:], []
        for _ in range(steps):
            last = head(output.last_hidden_state)[:, -1].index_fill(-1, torch.arange(FIRST_WORD), -torch.inf)
            said.append(last.argmax(-1, keepdim=True))
            following = following + 1
            output = text(
                inputs_embeds=model.get_input_embeddings()(said[-1]),
                position_ids=following,
                past_key_values=output.past_key_values,
            )
        yield logits, torch.cat(said, dim=1)[0] if said else None


def expected_logits(name, model, inputs, kept, embeds, positions):
    """Logits `[B, T, V]` of the kept tokens where the others are hidden, or never came."""
    if BY_NAME[name].hides:
        return model(**{**inputs, "attention_mask": kept.long(), "position_ids": positions}).logits
    rows = [logits for logits, _ in removed(model, embeds, positions, kept, steps=0)]
    whole = rows[0].new_zeros(*kept.shape, rows[0].shape[-1])
    whole[kept] = torch.cat(rows)
    return whole


def check_prompt(name, prompt):
    """Logits and greedy tokens."""
    model, inputs = example(name, prompt)
    length = inputs["input_ids"].shape[1]
    whole, embeds, positions = watched(model, lambda: model(**inputs).logits)
    with pruned_by(model) as pruning:
        pruned, kept = model(**inputs).logits, pruning.keep_mask
        said = generate(model, inputs)
    expected = expected_logits(name, model, inputs, kept, embeds, positions)
    assert (pruned - expected)[kept].abs().max() < TOLERANCE
    assert (pruned - whole)[kept].abs().max() > 100 * TOLERANCE
    assert [sample.visual_tokens_after for sample in pruning.stats.samples] == [
        int(0.3 * sample.visual_tokens_before) for sample in pruning.stats.samples
    ]
    assert torch.equal(pruning.keep_mask, kept)
    assert torch.equal(said[:, :length], inputs["input_ids"])
    if BY_NAME[name].hides:
        hidden = {"attention_mask": kept.long(), "position_ids": positions - BY_NAME[name].first_position}
        assert torch.equal(said, generate(model, {**inputs, **hidden}))
    else:
        rows = removed(model, embeds, positions, kept, steps=NEW_TOKENS)
        assert torch.equal(said[:, length:], torch.stack([tokens for _, tokens in rows]))


OPTIONS = {
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "use_cache=False": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {},
}


def generation_example(name, mode):
    # upstream proposes tokens for one row at a time; only a single row can lose tokens physically
    one_row = mode in ("prompt lookup", "assisted") or not BY_NAME[name].hides
    model, inputs = example(name, "several images" if one_row else "padded batch")
    options = {"assistant_model": assistant_of(name)} if mode == "assisted" else OPTIONS[mode]
    return model, inputs, options


def check_generation(name, mode):
    """The tokens of `generate` with its options."""
    family, (model, inputs, options) = BY_NAME[name], generation_example(name, mode)
    _, embeds, positions = watched(model, lambda: generate(model, inputs))
    torch.manual_seed(1)
    whole = generate(model, inputs, **options)
    torch.manual_seed(1)
    with pruned_by(model) as pruning:
        pruned = generate(model, inputs, **options)
    of_beams = pruning.keep_mask.unflatten(0, (len(embeds), -1))
    kept = of_beams[:, 0]
    assert torch.equal(of_beams, kept[:, None].expand_as(of_beams))
    assert pruned.shape == whole.shape
    assert (kept.sum(1) < inputs["attention_mask"].sum(1)).all()
    torch.manual_seed(1)
    options = {} if mode == "assisted" else options
    if family.hides:
        hidden = {**inputs, "attention_mask": kept.long(), "position_ids": positions - family.first_position}
        assert torch.equal(pruned, generate(model, hidden, **options))
    else:
        without = {
            "inputs_embeds": embeds[:, kept[0]],
            "attention_mask": torch.ones(1, int(kept.sum()), dtype=torch.long),
            "position_ids": packed_positions(positions, kept),
        }
        said = generate(model, without, **options)
        assert torch.equal(pruned[:, inputs["input_ids"].shape[1] :], said)


def check_keeping_everything(name, _):
    """Everything kept: the same tokens, and nothing left on the model."""
    model, inputs = example(name, "padded batch")
    whole = generate(model, inputs)
    before = [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in model.modules()]
    with pruned_by(model, keep_ratio=1.0) as pruning:
        assert torch.equal(generate(model, inputs), whole)
    assert torch.equal(pruning.keep_mask, inputs["attention_mask"].bool())
    with pruned_by(model, keep_ratio=0.2):
        model(**inputs)
    after = [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in model.modules()]
    assert after == before
    assert torch.equal(generate(model, inputs), whole)


def check_eager(name, _):
    """Eager attention, and a budget for each image."""
    model, inputs = tiny_model(name, attention="eager"), batch(name, *prompts(name)["padded batch"])
    _, embeds, positions = watched(model, lambda: model(**inputs))
    with pruned_by(model, keep_ratio=2, budget="per_image") as pruning:
        pruned = model(**inputs).logits
    assert [sample.budget_per_image for sample in pruning.stats.samples] == [[2, 2], [2]]
    kept = pruning.keep_mask
    expected = expected_logits(name, model, inputs, kept, embeds, positions)
    assert (pruned - expected)[kept].abs().max() < TOLERANCE


def half_precision_example(name, mode):
    model, inputs = example(name, "padded batch")
    if mode == "autocast":
        return model, inputs, torch.bfloat16
    dtype = getattr(torch, mode)
    return copy.deepcopy(model).to(dtype), in_dtype(inputs, dtype), dtype


def check_half_precision(name, mode):
    """Half-precision weights, or autocast: off by rounding alone, where dropping tokens moves much more."""
    model, inputs, dtype = half_precision_example(name, mode)
    with torch.autocast("cpu", dtype, enabled=mode == "autocast"):
        whole, embeds, positions = watched(model, lambda: model(**inputs).logits)
        with pruned_by(model) as pruning:
            pruned, kept = model(**inputs).logits, pruning.keep_mask
            generate(model, inputs)
        expected = expected_logits(name, model, inputs, kept, embeds, positions)
    assert pruning.scores.dtype == torch.float32
    assert pruned.dtype == whole.dtype
    error, moved = ((pruned - other)[kept].float().abs().mean() for other in (expected, whole))
    assert error < 0.2 * moved


def check_labels(name, _):
    """The loss of labels at the question, and a gradient at the first attention layer."""
    model, inputs = example(name, "padded batch")
    _, embeds, positions = watched(model, lambda: model(**inputs))
    with torch.enable_grad(), pruned_by(model) as pruning:
        model(**inputs)
        # what a dropped token would have predicted has no label
        predicted = pruning.query_mask & torch.nn.functional.pad(pruning.keep_mask[:, :-1], (1, 0))
        labels = torch.where(predicted, inputs["input_ids"], -100)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    expected = expected_logits(name, model, inputs, pruning.keep_mask, embeds, positions)
    expected = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    assert torch.allclose(loss, expected, atol=TOLERANCE)
    attention = next(layer for layer in dissect(model).text.layers if hasattr(layer, "self_attn")).self_attn
    assert all(weight.grad is not None for weight in attention.parameters())
    model.zero_grad(set_to_none=True)


def check_copied_cache(name, _):
    """Two caches, one a deep copy of the other, continued in turns without masks or positions."""
    model, inputs = example(name, "several images")
    length, words_only = inputs["input_ids"].shape[1], torch.arange(FIRST_WORD)
    with pruned_by(model):
        expected = generate(model, inputs)[0, length:].tolist()
        output = model(**inputs, use_cache=True)
        first, said = output.logits[:, -1:].index_fill(-1, words_only, -torch.inf).argmax(-1), ([], [])
        states = [(output.past_key_values, first), (copy.deepcopy(output.past_key_values), first)]
        for _ in range(NEW_TOKENS):
            for number, (cache, token) in enumerate(states):
                said[number].append(token.item())
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
                states[number] = (cache, logits[:, -1:].index_fill(-1, words_only, -torch.inf).argmax(-1))
    assert said == (expected, expected)


def together(model, inputs):
    """Greedy tokens of several inputs, each in a thread; the threads meet in the first layer at every step."""
    meeting, said = threading.Barrier(len(inputs), timeout=60), [None] * len(inputs)

    def meet(*_):
        meeting.wait()

    hook = dissect(model).text.layers[0].register_forward_pre_hook(meet)

    @torch.no_grad()
    def serve(number):
        try:
            said[number] = generate(model, inputs[number])
        finally:
            if said[number] is None:
                meeting.abort()

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    return said


def threads_example(name):
    model, one = example(name, "several images")
    other = batch(name, question(BY_NAME[name].picture or Picture(2, 2), seed=8, after=7), seed=3)
    return model, [one, other]


def check_threads(name, _):
    """Two requests at once."""
    model, inputs = threads_example(name)
    with pruned_by(model):
        expected = [generate(model, request) for request in inputs]
        said = together(model, inputs)
    assert all(torch.equal(*pair) for pair in zip(said, expected, strict=True))


class ForwardOnly(torch.nn.Module):
    """Stands for a quantised projection: a forward, but no weight to read."""

    def __init__(self, linear):
        super().__init__()
        self._scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self._packed = (linear.weight.detach() / self._scale).round().to(torch.int8)
        self._offset = linear.bias

    def forward(self, hidden_states):
        return torch.nn.functional.linear(hidden_states, self._packed * self._scale, self._offset)


def check_quantised(name, _):
    """Projections of all attention layers that are not `nn.Linear`."""
    _, inputs = example(name, "padded batch")
    model = copy.deepcopy(model_of(name))
    for layer in dissect(model).text.layers:
        attention = getattr(layer, "self_attn", torch.nn.Module())
        for part, module in list(attention.named_children()):
            if isinstance(module, torch.nn.Linear):
                setattr(attention, part, ForwardOnly(module))
    _, embeds, positions = watched(model, lambda: model(**inputs))
    with pruned_by(model) as pruning:
        pruned, kept = model(**inputs).logits, pruning.keep_mask
    expected = expected_logits(name, model, inputs, kept, embeds, positions)
    assert (pruned - expected)[kept].abs().max() < TOLERANCE


def compiled_decoding(model, inputs, positions):
    """Tokens of compiled decoding over a static cache, and how many graphs that took."""
    limit = inputs["input_ids"].shape[1] + NEW_TOKENS
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=limit)
    output = model(**inputs, past_key_values=cache, logits_to_keep=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    said, words_only = [], torch.arange(FIRST_WORD)
    for step in range(1, NEW_TOKENS + 1):
        said.append(output.logits[:, -1:].index_fill(-1, words_only, -torch.inf).argmax(-1))
        position = positions[..., -1:] + step
        output = compiled(input_ids=said[-1], past_key_values=cache, position_ids=position)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return torch.cat(said, dim=1), graphs


def compiled_example(name):
    # tracing takes longer with each layer
    kinds = BY_NAME[name].text.get("layer_types")
    changes = {"num_hidden_layers": 2, **({} if kinds is None else {"layer_types": kinds[:2]})}
    model, inputs = tiny_model(name, text_changes=changes), batch(name, *prompts(name)["several images"])
    _, _, positions = watched(model, lambda: model(**inputs))
    return model, inputs, positions


def check_compiled(name, _):
    """Decoding as compiled graphs, no more of them than unpruned."""
    model, inputs, positions = compiled_example(name)
    _, graphs = compiled_decoding(model, inputs, positions)
    with pruned_by(model):
        expected = generate(model, inputs)[:, inputs["input_ids"].shape[1] :]
        said, pruned_graphs = compiled_decoding(model, inputs, positions)
    assert torch.equal(said, expected)
    assert pruned_graphs == graphs


def dispatched(name, folder):
    """A model whose text layers accelerate keeps on the CPU and on the disk in turn."""
    from accelerate import dispatch_model

    model = copy.deepcopy(model_of(name))
    layers = dissect(model).text.layers
    place = {id(layer): ("disk", "cpu")[number % 2] for number, layer in enumerate(layers)}
    names = {module_name: place[id(module)] for module_name, module in model.named_modules() if id(module) in place}
    stem = next(iter(names)).rsplit(".", 1)[0]
    device_map = {**names, **_others(model, stem)}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


def _others(model, stem, prefix=""):
    """Everything except the layers under `stem`, in modules as large as possible, on the CPU."""
    places = {}
    for part, module in model.named_children():
        path = f"{prefix}{part}"
        if stem == path or not stem.startswith(path + "."):
            places |= {} if stem == path else {path: "cpu"}
        else:
            places |= _others(module, stem, path + ".")
    return places | {f"{prefix}{part}": "cpu" for part, _ in model.named_parameters(recurse=False)}


def check_device_map(name, _):
    """Layers on several devices, by accelerate."""
    model, inputs = example(name, "padded batch")
    with pruned_by(model) as pruning:
        expected, kept, said = model(**inputs).logits, pruning.keep_mask, generate(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        model = dispatched(name, folder)
        assert any(weight.device.type == "meta" for weight in dissect(model).text.layers[0].parameters())
        before = [(dict(vars(module)["_forward_pre_hooks"]), module.forward) for module in model.modules()]
        with pruned_by(model) as pruning:
            logits = model(**inputs).logits
            assert torch.equal(pruning.keep_mask, kept)
            assert torch.equal(generate(model, inputs), said)
        after = [(dict(vars(module)["_forward_pre_hooks"]), module.forward) for module in model.modules()]
    assert (logits - expected)[kept].abs().max() < TOLERANCE
    assert before == after


CHECKS = {
    "one image": check_prompt,
    "several images": check_prompt,
    "padded batch": check_prompt,
    "text rows": check_prompt,
    "video": check_prompt,
    **dict.fromkeys(OPTIONS, check_generation),
    "keep everything": check_keeping_everything,
    "copied caches": check_copied_cache,
    "threads": check_threads,
    "labels": check_labels,
    "eager": check_eager,
    "float16": check_half_precision,
    "bfloat16": check_half_precision,
    "autocast": check_half_precision,
    "quantised": check_quantised,
    "device_map": check_device_map,
    "compiled decoding": check_compiled,
}


@torch.no_grad()
def check(name, mode):
    """Fail where a mode of a family is not what it should be."""
    CHECKS[mode](name, mode)


@torch.no_grad()
def lacks_unpruned(name, mode):
    """Why the unpruned model does not have a mode, or has it wrong; None where it works."""
    try:
        return _UNPRUNED[mode](name, mode)
    except Exception as error:  # whatever upstream raises
        return f"{type(error).__name__}: {error}"


def _runs(name, mode):
    model, inputs = example(name, mode if mode in prompts(name) else "padded batch")
    model(**inputs)
    generate(model, inputs)


def _runs_in_half_precision(name, mode):
    model, inputs, dtype = half_precision_example(name, mode)
    with torch.autocast("cpu", dtype, enabled=mode == "autocast"):
        model(**inputs)
        generate(model, inputs)


def _generates(name, mode):
    if mode in ("prompt lookup", "assisted"):
        if VERSION < (5, 14):
            return (
                "before transformers 5.14 caches are cropped to a length of the whole prompt; pruned, that is refused"
            )
        if VERSION < NEWEST and not BY_NAME[name].hides:
            return "the state of a convolution is not taken back with the tokens that were guessed wrong"
    model, inputs, options = generation_example(name, mode)
    _, plain, _ = watched(model, lambda: generate(model, inputs))
    said, embeds, _ = watched(model, lambda: generate(model, inputs, **options))
    if mode in ("prompt lookup", "assisted"):
        return None if torch.equal(said, generate(model, inputs)) else "other tokens than without proposals"
    if mode != "beams":
        return None
    beams = embeds.unflatten(0, (len(plain), -1))
    same = torch.allclose(beams, plain[:, None].expand_as(beams), atol=1e-3)
    return None if same else "the beams of a sample get features of other images"


def _serves_threads(name, _):
    model, inputs = threads_example(name)
    expected = [generate(model, request) for request in inputs]
    same = [torch.equal(*pair) for pair in zip(together(model, inputs), expected, strict=True)]
    return None if all(same) else "two requests at once disturb each other"


def _decodes_compiled(name, _):
    model, inputs, positions = compiled_example(name)
    expected = generate(model, inputs)[:, inputs["input_ids"].shape[1] :]
    return None if torch.equal(compiled_decoding(model, inputs, positions)[0], expected) else "other tokens"


def _runs_on_several_devices(name, _):
    model, inputs = example(name, "padded batch")
    with tempfile.TemporaryDirectory() as folder:
        spread = dispatched(name, folder)
        same = torch.allclose(spread(**inputs).logits, model(**inputs).logits, atol=TOLERANCE)
        same = same and torch.equal(generate(spread, inputs), generate(model, inputs))
    return None if same else "other logits or tokens"


_UNPRUNED = {
    **dict.fromkeys(CHECKS, _runs),
    **dict.fromkeys(OPTIONS, _generates),
    **dict.fromkeys(("float16", "bfloat16", "autocast"), _runs_in_half_precision),
    "threads": _serves_threads,
    "compiled decoding": _decodes_compiled,
    "device_map": _runs_on_several_devices,
}
