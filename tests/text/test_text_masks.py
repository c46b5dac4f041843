import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmssl.random import generator
from mmssl.types import Rejected
from modalities.text.masks import budget, pieces, replacing, single, span_length, whole_words, word_spans
from modalities.text.tokenizer import encode
from modalities.text.views import MaskOptions

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "masked-prediction.json").read_text())
TEXTS = ["x", "return self", "the value of an argument is a string", "a name of the parser and its options, or not"]
KINDS = ("token", "word", "wordspan")
WORD = torch.tensor([0, 1, 1, 1, 2, 3, 3, 4, 5, 5, 5, 5, 6, 7, 8, 8, 9])
FREE = (WORD > 0) & (WORD < 9)  # the first and the last are special


def draw(*parts):
    return lambda view: generator("text", *parts, view)


def toy(vocabulary, model, pre):
    """A tokenizer of transformers with these pieces."""
    ids = {piece: i for i, piece in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *vocabulary])}
    fast = Tokenizer(model(ids))
    fast.pre_tokenizer = pre
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=fast, **names)


WORDPIECE = toy(
    ["un", "##happ", "##y", "dog", "##s", ".", "\u2581"],
    lambda ids: models.WordPiece(ids, unk_token="[UNK]"),
    pre_tokenizers.BertPreTokenizer(),
)
BYTES = toy(
    [*"abc\u0120\u010a.", "\u0120a", "\u0120b", "bc"],
    lambda ids: models.BPE(ids, [("\u0120", "a"), ("\u0120", "b"), ("b", "c")]),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
)


@pytest.mark.parametrize("case", VECTORS["mlm_counts"]["bert_static"], ids=lambda case: f"{case['len']}-{case['cap']}")
def test_bert_hides_as_many_as_the_authors(case):
    assert min(case["cap"], budget(case["len"], 0.15, "nearest", generator("b"))) == case["predict"]


def test_other_roundings():
    counts = [budget(30, 0.15, "random", generator("b", i)) for i in range(2000)]  # 4.5
    assert set(counts) == {4, 5}
    assert 0.46 < np.mean(counts) - 4 < 0.54
    assert [budget(n, 0.15, "up", generator("b")) for n in (1, 10, 20, 21)] == [1, 2, 3, 4]
    assert budget(3, 0.01, "random", generator("b")) == budget(3, 0.01, "nearest", generator("b")) == 1


def test_span_lengths_are_those_of_spanbert():
    given = VECTORS["spanbert_lengths"]
    source = generator("lengths")
    found = np.bincount([span_length(source) for _ in range(8_000)], minlength=given["lmax"] + 1)[1:] / 8_000
    assert np.abs(found - given["probs"]).max() < 0.015
    assert abs((found * np.arange(1, 11)).sum() - given["mean"]) < 0.1


@pytest.mark.parametrize(
    ("text", "tokenizer", "words"),
    [
        ("unhappy dogs.", WORDPIECE, [["un", "##happ", "##y"], ["dog", "##s"], ["."]]),
        ("bc abc b\na.", BYTES, [["bc"], ["\u0120a", "bc"], ["\u0120b"], ["\u010a"], ["a", "."]]),
    ],
)
def test_words_are_told_by_the_marks_of_pieces(text, tokenizer, words):
    known = pieces(tokenizer, [0, 1, 2, 3])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    word = known.words(torch.tensor([1, *ids, 2])).tolist()
    assert (word[0], word[-1], word[-1] - 1) == (0, len(words) + 1, len(words))  # special tokens are words by themselves
    found = [[tokenizer.convert_ids_to_tokens(i) for i, w in zip(ids, word[1:-1]) if w == n + 1] for n in range(len(words))]
    assert found == words
    assert known.special.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_words_of_sentencepiece_are_split_at_spaces(tokenizer):
    known = pieces(tokenizer, [0, 1, 2, 999])
    for text in TEXTS:
        (ids,) = encode(tokenizer, [text])
        assert int(known.words(torch.from_numpy(ids))[-1]) + 1 == len(text.split())


@pytest.mark.parametrize("choose", [whole_words, word_spans])
def test_whole_words_within_the_budget(choose):
    sizes, seen, full = WORD.bincount(), torch.zeros(len(WORD)), 0
    for i in range(400):
        number = 1 + i % 8
        hidden = choose(WORD, FREE, number, generator("w", i))
        assert 1 <= int(hidden.sum()) <= number
        assert not (hidden & ~FREE).any()
        share = torch.zeros(10).index_add(0, WORD, hidden.float()) / sizes
        assert set(share.tolist()) <= {0.0, 1.0}
        full, seen = full + int(hidden.sum() == number), seen + hidden
    assert full > 300  # there are words of one token
    assert bool((seen[FREE] > 0).all())


def test_spans_of_words_hang_together():
    word = torch.arange(200)
    free = torch.ones(200, dtype=torch.bool)
    runs = []
    for i in range(50):
        hidden = word_spans(word, free, 30, generator("s", i)).int()
        assert int(hidden.sum()) == 30
        runs.append(int((hidden.diff(prepend=torch.zeros(1, dtype=torch.int32)) == 1).sum()))
    # Cut at the budget, at what is hidden and at the end, and sometimes next to each other.
    assert 30 / 5 < np.mean(runs) < 30 / 3


@pytest.mark.parametrize("choose", [whole_words, word_spans])
def test_where_no_word_fits_the_beginning_of_one_is_hidden(choose):
    word, free = torch.tensor([0, 1, 1, 1, 2, 2, 2, 3]), torch.tensor([False, *[True] * 6, False])
    found = {tuple(choose(word, free, 2, generator("w", i)).nonzero().flatten().tolist()) for i in range(40)}
    assert found == {(1, 2), (4, 5)}


def test_single_tokens_are_drawn_evenly_and_without_replacement():
    hidden = torch.stack([single(FREE, 4, generator("t", i)) for i in range(2000)])
    assert (hidden.sum(1) == 4).all()
    assert not hidden[:, ~FREE].any()
    assert float((hidden[:, FREE].float().mean(0) - 4 / 15).abs().max()) < 0.04
    assert single(FREE, 99, generator("t")).equal(FREE)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_padded_texts(views, kind):
    every = views(pack=False, max_tokens=64, mask=MaskOptions(kind, 0.3, copies=3))
    made = [every(text, draw(i)) for i, text in enumerate(TEXTS)]
    (view,) = every.collate(made)
    mask, pad = view.mask, view.pad.repeat_interleave(3, 0)
    assert not (mask.hidden & (pad | (view.x.repeat_interleave(3, 0) < 3))).any()
    counts = mask.hidden.sum(1)
    assert bool((counts >= 1).all())
    assert bool((counts <= (~pad).sum(1) * 0.3 + 1).all())
    assert len({tuple(row.tolist()) for row in mask.hidden}) > 6
    assert (mask.count, mask.wanted.shape) == (0, (12, 1, int(counts.max())))
    assert (every.ragged, every.replaces) == (True, True)
    (alone,) = every.collate([every(TEXTS[2], draw(2))])  # depends on the sample, not on its place
    assert alone.mask.hidden.equal(mask.hidden[6:9, : alone.x.shape[1]])


def test_wanted_places_begin_with_those_that_are_hidden():
    hidden = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    mask = replacing(hidden)
    assert mask.wanted.shape == (3, 1, 2)
    assert mask.wanted[0, 0].tolist() == [1, 3]
    assert mask.wanted[1, 0, 0] == 4
    assert hidden.gather(1, mask.wanted[:, 0]).sum(1).tolist() == hidden.sum(1).tolist()
    assert replacing(hidden[2:]).wanted.shape == (1, 1, 1)


def test_most_and_ends(views):
    block = np.full(63, 9)
    block[[5, 20]] = 2
    few = views(max_tokens=64, mask=MaskOptions("token", 0.5, copies=20, rounding="nearest", most=7))
    (view,) = few.collate([few(block, draw())])
    assert (view.mask.hidden.sum(1) == 7).all()
    for ends in (False, True):
        some = views(max_tokens=64, mask=MaskOptions("token", 0.5, copies=100, ends=ends))
        (view,) = some.collate([some(block, draw())])
        assert (view.mask.hidden.any(0)[[0, 6, 21]].tolist()) == [ends] * 3
        assert view.mask.hidden.any(0).sum() == 61 + 3 * ends


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [False, True])
def test_special_tokens_only_are_rejected(views, kind, ends):
    every = views(pack=False, max_tokens=64, mask=MaskOptions(kind, 0.15, copies=1, ends=ends))
    with pytest.raises(Rejected, match="empty: special tokens only"):
        every(np.array([0, 2]), draw())
    assert every(np.array([0, 9, 2]), draw())["x"].tolist() == [0, 9, 2]
    assert views(pack=False)(np.array([0, 2]), draw())["x"].tolist() == [0, 2]  # nothing is to be hidden


def test_a_vocabulary_without_marks_cannot_tell_words(views, tmp_path):
    fast = toy(["a", "b"], lambda ids: models.WordLevel(ids, unk_token="[UNK]"), pre_tokenizers.Whitespace())
    fast.save_pretrained(tmp_path)
    options = {"vocab_size": 10, "pad_token_id": 0, "name": str(tmp_path), "pack": False}
    with pytest.raises(ValueError, match=r"views\.mask\.kind: word, but pieces of .* take token"):
        _ = views(mask=MaskOptions("word", 0.15), **options).tokenizer
    assert len(views(mask=MaskOptions("token", 0.15), **options)("a b", draw())["x"]) == 4


def test_options_out_of_range_are_refused(views):
    with pytest.raises(ValueError, match=r"mask\.most: 0, must be at least 1"):
        views(mask=MaskOptions("token", 0.15, most=0))
