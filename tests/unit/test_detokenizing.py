"""Texts of completions that are decoded side by side, against the tokenizer's own."""

from __future__ import annotations

import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slipstream.rollouts.detokenizing import _decodes_plainly, texts_of


def byte_level(kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast, **options):
    """All bytes, a special token, and one that was added."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab, []))
    raw.decoder = decoders.ByteLevel()
    made = kind(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", **{"clean_up_tokenization_spaces": False} | options
    )
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


class OwnDecoding(PreTrainedTokenizerFast):
    def _decode(self, *args, **kwargs):
        return super()._decode(*args, **kwargs).upper()


def patched():
    tokenizer = byte_level()
    plain = tokenizer.decode
    tokenizer.decode = lambda *args, **kwargs: [text.upper() for text in plain(*args, **kwargs)]
    return tokenizer


def cleaned_up():
    corrupting = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return byte_level(clean_up_tokenization_spaces=True, **{corrupting: True})


@pytest.mark.parametrize(
    ("make", "plainly"),
    [(byte_level, True), (tiny.tokenizer, True), (lambda: byte_level(OwnDecoding), False), (patched, False),
     (cleaned_up, False)],
    ids=["bytes", "characters", "own", "patched", "cleaned up"],
)  # fmt: skip
def test_the_texts_are_the_tokenizers(make, plainly):
    tokenizer = make()
    assert _decodes_plainly(tokenizer) is plainly
    size = len(tokenizer)
    words = [tokenizer.convert_tokens_to_ids(list(text)) for text in ("ab", "n't", "i.")]
    # Parts of characters, special tokens, nothing, and ids that a model has beyond its tokenizer's.
    completion_ids = [*words, [], [0, 1], list(range(size + 3)), [*range(size - 1, 1, -3)], tuple(range(2, 9))]
    expected = tokenizer.batch_decode([list(ids) for ids in completion_ids], skip_special_tokens=True)
    assert texts_of(tokenizer, completion_ids) == expected
    assert texts_of(tokenizer, []) == []
