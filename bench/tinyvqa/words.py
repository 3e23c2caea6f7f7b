"""The word-level tokenizer that all miniatures have, each with special tokens and a chat template of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.tinyvqa.questions import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_word_tokenizer(
    special_tokens: Sequence[str], *, pad: str, end: str, unknown: str, chat_template: str
) -> PreTrainedTokenizerFast:
    """Build a tokenizer that lower-cases, splits punctuation off, knows these special tokens first, and pads left.

    Args:
        special_tokens: all of them, in the order of their ids; the vocabulary follows.
        pad: which of them fills rows up.
        end: which of them ends a turn.
        unknown: which of them stands for an unknown word.
        chat_template: of the tokenizer.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*special_tokens, *vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        additional_special_tokens=[token for token in special_tokens if token not in (pad, end, unknown)],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
