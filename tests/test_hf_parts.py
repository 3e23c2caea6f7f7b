"""The parts below `prune`: finding the question, packing the survivors."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hawk_kernels.hf.packing import Packing
from hawk_kernels.hf.prompt import Prompt, padded_positions
from hawk_kernels.hf.question import (
    AFTER_LAST_VISUAL,
    ALL_TEXT,
    ALL_TEXT_SINCE_IMAGE_TURN,
    LAST_TURN,
    NO_VISUAL,
    ChatQuestion,
    Markers,
    find_markers,
    text_queries,
)
from hawk_kernels.hf.sources import EncodingWatch

PAD, START, END, IMAGE, TURN, OTHER_TURN, REPLY_END = 0, 1, 2, 3, 5, 6, 4
MARKERS = Markers(vision_ends=(END,), turn_ends=(TURN, OTHER_TURN), reply_ends=(REPLY_END,))


@pytest.mark.parametrize(
    ("ids", "expected", "source"),
    [
        # text, image, question, end of turn, header of the reply
        ([9, 9, START, IMAGE, IMAGE, END, 7, 8, TURN, 9], "......xx..", AFTER_LAST_VISUAL),
        # padding never ranks, on either side
        ([PAD, PAD, 9, START, IMAGE, END, 7, 8, TURN, 9], "......xx..", AFTER_LAST_VISUAL),
        ([9, START, IMAGE, END, 7, 8, TURN, 9, PAD, PAD], "....xx....", AFTER_LAST_VISUAL),
        # no end of turn: to the end
        ([9, START, IMAGE, END, 7, 8, 7], "....xxx", AFTER_LAST_VISUAL),
        # several images: after the last one
        ([START, IMAGE, END, 7, START, IMAGE, END, 8, TURN], ".......x.", AFTER_LAST_VISUAL),
        # several turns: the user's last, which the header of the reply follows
        ([START, IMAGE, END, 7, TURN, 9, 8, OTHER_TURN, 7, 7, TURN, 9, 9], "........xx...", LAST_TURN),
        # without that header too, whatever ends a turn
        ([START, IMAGE, END, 7, TURN, 9, 8, OTHER_TURN, 7, 7, TURN], "........xx.", LAST_TURN),
        # the reply is there already, as in training: the question before it counts; a line break may follow it
        ([START, IMAGE, END, 7, 8, TURN, 9, 8, TURN], "...xx....", LAST_TURN),
        ([START, IMAGE, END, 7, 8, TURN, 9, 8, TURN, 9], "...xx.....", LAST_TURN),
        # after a reply comes a question that nothing closes yet
        ([START, IMAGE, END, 7, 8, TURN, 9, 8, TURN, 8, 7], ".........xx", LAST_TURN),
        # two questions in a row, each opened by 10, 11 as the image's turn is, and the opening of a reply, 10, 12
        ([10, 11, START, IMAGE, END, 7, TURN, 10, 11, 8, TURN, 10, 12], ".......xxx...", LAST_TURN),
        # the second question, which nothing closes, comes after a line break
        (
            [9, TURN, 8, 10, 11, START, IMAGE, END, 7, TURN, 8, 10, 12, 7, TURN, 8, 10, 11, 7],
            "...............xxxx",
            LAST_TURN,
        ),
        # a question in a turn after that of the image
        ([START, IMAGE, END, TURN, 9, 8, TURN, 7, 7, TURN, 9, 9], ".......xx...", LAST_TURN),
        ([START, IMAGE, END, TURN, 7, 7, TURN, 9, 9], "....xx...", LAST_TURN),
        # a system turn before the image ends none of the question
        ([9, TURN, START, IMAGE, END, 7, 8], ".....xx", AFTER_LAST_VISUAL),
        # nothing closes a question, only replies are closed: what follows the last of them
        ([START, IMAGE, END, 7, 8, 9, REPLY_END, 7, 7, 9], ".......xxx", LAST_TURN),
        ([START, IMAGE, END, 7, 8, 9, REPLY_END], "...xxx.", AFTER_LAST_VISUAL),
        # the question came first: all text after the first token
        ([9, 7, 8, START, IMAGE, IMAGE, END], ".xxx..x", ALL_TEXT),
        ([PAD, 9, 7, START, IMAGE, END, TURN, 9], "..xx.xxx", ALL_TEXT),
        # but it does not take the system prompt
        ([9, 8, TURN, 7, START, IMAGE, END, TURN, 9], "...xx.xxx", ALL_TEXT_SINCE_IMAGE_TURN),
        # there is nothing to rank
        ([9, 7, 8, TURN], "....", NO_VISUAL),
    ],
)
def test_where_the_question_stands(ids, expected, source):
    ids = np.array([ids])
    valid = ids != PAD
    queries, sources = text_queries(ids, valid, ids == IMAGE, MARKERS)
    assert "".join("x" if asked else "." for asked in queries[0]) == expected
    assert sources == [source]


def test_without_a_vision_end_token_the_question_follows_the_last_visual_token():
    ids = np.array([[9, IMAGE, IMAGE, 2, 7, TURN]])
    queries, _ = text_queries(ids, ids > 0, ids == IMAGE, Markers(turn_ends=(TURN,)))
    assert queries.tolist() == [[False, False, False, True, True, False]]


def model_like(vocab_size, eos, generation_eos=None, **ids):
    text = SimpleNamespace(vocab_size=vocab_size, eos_token_id=eos)
    config = SimpleNamespace(get_text_config=lambda: text, **ids)
    return SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=generation_eos))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # what the configs say
        (model_like(120, 5, [5, 6], vision_end_token_id=2), Markers((2,), (5, 6), ())),
        (model_like(120, None, torch.tensor([5]), eoi_token_index=2, image_token_id=3), Markers((2,), (5,), ())),
        (model_like(120, 5, image_end_token_id=2, video_end_token_id=8), Markers((2, 8), (5,), ())),
        # what is known of public tokenizers: Vicuna, Mistral, InternVL3, SmolVLM, GLM-4
        (model_like(32064, 2), Markers((), (), (2,))),
        (model_like(131072, 2, image_token_id=10), Markers((13,), (), (2,))),
        (model_like(151674, 151645, image_token_id=151667), Markers((151666,), (151645,), ())),
        (model_like(49280, 2, 49279, image_token_id=49190), Markers((49189,), (49279,), (2,))),
        (model_like(151552, [151329, 151336], image_end_token_id=151340), Markers((151340,), (151329,), (151336,))),
        # the same ids in a small vocabulary are words
        (model_like(120, 2, image_token_id=10), Markers((), (2,), ())),
    ],
)
def test_markers_of_configs_and_of_public_tokenizers(model, expected):
    assert find_markers(model) == expected


CHATS = {
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "Llama 3": (
        "<s>{% for m in messages %}<|start_header_id|> {{m.role}} <|end_header_id|>\n\n{{m.content}}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|> assistant <|end_header_id|>\n\n{% endif %}"
    ),
    "Gemma": (
        "<s>{% for m in messages %}<start_of_turn> {{'model' if m.role == 'assistant' else m.role}}\n{{m.content}}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn> model\n{% endif %}"
    ),
    "Mistral": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]{{m.content}}[/INST]{% elif m.role == 'system' %}"
        "[SYSTEM_PROMPT]{{m.content}}[/SYSTEM_PROMPT]{% else %}{{m.content}}</s>{% endif %}{% endfor %}"
    ),
    "Vicuna": (
        "<s>{% for m in messages %}{% if m.role == 'user' %} USER: {{m.content}}{% elif m.role == 'system' %}"
        "{{m.content}}{% else %} ASSISTANT: {{m.content}}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    ),
    "GLM": (
        "[gMASK]<sop>{% for m in messages %}<|{{m.role}}|>\n{{m.content}}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "DeepSeek": (
        "<s>{% for m in messages %}{% if m.role == 'system' %}{{m.content}}\n\n{% elif m.role == 'user' %}"
        "User: {{m.content}}\n\n{% else %}Assistant: {{m.content}}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "Idefics": (
        "<s>{% for m in messages %}{{m.role | capitalize}}: {{m.content}}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "Cohere": (
        "<s>{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{m.role | upper}}_TOKEN|>{{m.content}}"
        "<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|ASSISTANT_TOKEN|>{% endif %}"
    ),
}
SPECIAL = re.compile(r"<[^ <>]+>|\[[^ \[\]]+\]")


def tokenizer_of(template):
    """A tokenizer of whole words whose special tokens are those in angle and square brackets."""
    markers = set(SPECIAL.findall(template)) | {f"<|{role}|>" for role in ("user", "assistant", "system")}
    markers |= {f"<|{role}_TOKEN|>" for role in ("USER", "ASSISTANT", "SYSTEM")} | {"<image>", "<unk>", "</image>"}
    roles = "user assistant system model User: Assistant: System: USER: ASSISTANT:"
    said = ["be", "brief", "what", "is", "left", "why", "a", "cat"]
    words = {word: index for index, word in enumerate([*sorted(markers), *said, *roles.split()])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": sorted(markers)})
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("template", CHATS.values(), ids=CHATS)
def test_the_last_question_by_a_chat_template(template):
    tokenizer = tokenizer_of(template)
    question = ChatQuestion(tokenizer)

    def asked(*turns, generate=True):
        messages = [{"role": role, "content": content} for role, content in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        assert tokenizer.unk_token_id not in ids
        return tokenizer.decode(ids[question(ids)]).strip()

    image = "<image><image></image>"
    first = ("user", f"{image} what is left")
    assert asked(first) == "what is left"
    assert asked(("system", "be brief"), first) == "what is left"
    assert asked(("system", "be brief"), first, ("assistant", "a cat"), ("user", "why a cat")) == "why a cat"
    assert asked(first, ("assistant", "a cat"), generate=False) == "what is left"
    assert asked(("user", f"be brief {image} what is left"), generate=False) == "what is left"
    # text before the image only, and on both sides of it
    assert asked(("user", f"what is left {image}")) == "what is left"
    assert asked(("user", f"be brief {image} what is left")) == "what is left"


def test_what_no_chat_template_explains_is_refused():
    tokenizer = tokenizer_of(CHATS["ChatML"])
    assert not ChatQuestion(tokenizer)(torch.zeros(1, 4, dtype=torch.long)).any()
    tokenizer.chat_template = "{% for m in messages %}{{m.content}}{% endfor %}"
    with pytest.raises(ValueError, match="marks where a user's turn begins"):
        ChatQuestion(tokenizer)
    tokenizer.chat_template = "{{messages[-1].content}}"
    with pytest.raises(ValueError, match="questions and replies in their order"):
        ChatQuestion(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="with a chat template, got one without"):
        ChatQuestion(tokenizer)


def test_images_are_runs_of_one_placeholder():
    ids = np.array([[9, 3, 3, 8, 3, 4, 4, 9]])
    visual = np.isin(ids, (3, 4))
    prompt = Prompt(ids, ids > 0, visual, ~visual, ["given"], 8)
    assert [image.tolist() for image in prompt.images(0)] == [[1, 2], [4], [5, 6]]
    assert prompt.unit_lengths() == [[2, 1, 2]]
    assert prompt.ends_in_text(1)
    assert not prompt.ends_in_text(2)


def rows_of_bools(length):
    return st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4)


masks = st.integers(1, 12).flatmap(rows_of_bools)


@given(masks)
@settings(max_examples=60, deadline=None)
def test_padded_positions_list_the_true_entries(rows):
    mask = np.array(rows)
    positions, filled = padded_positions(mask)
    assert [list(p[f]) for p, f in zip(positions, filled, strict=True)] == [list(np.flatnonzero(row)) for row in mask]
    assert not positions[~filled].any()


@given(masks)
@settings(max_examples=60, deadline=None)
def test_packing_moves_survivors_together_and_back(rows):
    kept = torch.tensor(rows)
    counts = kept.sum(1).tolist()
    batch, length = kept.shape
    tokens = torch.arange(1.0, batch * length + 1).view(batch, length, 1)
    packing = Packing(tokens, kept, counts, torch.arange(length).expand(3, 1, length))
    packed, positions = packing.inputs_embeds, packing.position_ids
    assert torch.equal(packing.pack(tokens) * packing.mask[..., None], packed)
    assert packed.shape == (batch, packing.length, 1)
    assert positions.shape == (3, batch, packing.length)
    assert packing.mask.sum(1).tolist() == counts
    for row in range(batch):
        survivors = packing.mask[row].bool()
        assert survivors.tolist() == sorted(survivors.tolist())
        assert torch.equal(packed[row, survivors], tokens[row, kept[row]])
        assert torch.equal(positions[0, row, survivors], kept[row].nonzero().flatten())
    assert torch.equal(packing.unpack(packed), tokens * kept[..., None])
    assert packing.is_full == all(count == packing.length for count in counts)


def test_the_text_row_of_positions_has_no_gaps_and_arguments_a_token_are_packed():
    kept = torch.tensor([[True, False, True, True], [False, False, True, True]])
    arguments = {
        "inputs_embeds": torch.randn(2, 4, 8),
        "per_layer": torch.arange(16).view(2, 4, 1, 2),
        "other": torch.randn(2, 3),
        "position_ids": torch.arange(4).expand(4, 2, 4),
        "use_cache": True,
    }
    packing = Packing(arguments["inputs_embeds"], kept, [3, 2], arguments["position_ids"])
    packed, following = packing.pack_arguments(arguments)
    assert packed["inputs_embeds"].tolist() == [
        arguments["inputs_embeds"][0, [0, 2, 3]].tolist(),
        [[0.0] * 8, *arguments["inputs_embeds"][1, [2, 3]].tolist()],
    ]
    assert packed["position_ids"][0].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert packed["position_ids"][1].tolist() == [[0, 2, 3], [0, 2, 3]]
    assert packed["per_layer"].shape == (2, 3, 1, 2)
    assert packed["other"] is arguments["other"]
    assert packed["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert following.tolist() == [[[4], [4]]] * 4


def test_images_that_a_video_is_encoded_by_are_not_counted_as_images():
    class Multimodal:
        def get_image_features(self, pixel_values):
            return [torch.zeros(3, 8)]

        def get_video_features(self, pixel_values_videos):
            return [*self.get_image_features(pixel_values_videos), torch.zeros(2, 8)]

    multimodal = Multimodal()
    watch = EncodingWatch(multimodal)
    watch.start()
    handles = watch.attach()
    multimodal.get_video_features(torch.zeros(1))
    assert {kind: run.lengths for kind, run in watch.encoded({}).items()} == {"video": [3, 2]}
    for handle in reversed(handles):
        handle.remove()
    assert not vars(multimodal)
