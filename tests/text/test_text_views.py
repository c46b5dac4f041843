import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmssl.random import generator
from mmssl.types import Rejected
from modalities.text import TextViews
from modalities.text.tokenizer import encode
from modalities.text.views import MaskOptions, configure

TEXTS = ["x", "return self", "the value of an argument is a string", "a name of the parser and its options"]


def draw(*parts):
    return lambda view: generator("text", *parts, view)


def samples(views, texts=TEXTS):
    return [views(text, draw(i)) for i, text in enumerate(texts)]


def test_a_text_opens_and_closes(views, tokenizer):
    for text in TEXTS:
        x = views(pack=False, max_tokens=64)(text, draw())["x"]
        assert x.dtype == torch.int64
        assert x.tolist() == tokenizer(text)["input_ids"]  # the tokenizer's own template


def test_a_packed_block_gets_its_beginning_and_a_document_is_complete(views):
    block = np.array([7, 8, 2, 9])
    assert views(pack=True)(block, draw())["x"].tolist() == [0, 7, 8, 2, 9]
    assert views(pack=False)(np.array([0, 7, 8, 2]), draw())["x"].tolist() == [0, 7, 8, 2]


def test_a_long_text_gives_a_window_at_a_keyed_place(views, tokenizer, corpus):
    text = max(corpus, key=len)
    (ids,) = encode(tokenizer, [text])
    windows = [views(pack=False)(text, draw(i))["x"].tolist() for i in range(60)]
    assert {len(window) for window in windows} == {16}
    assert {(window[0], window[-1]) for window in windows} == {(0, 2)}
    every = {tuple(ids[i : i + 14].tolist()) for i in range(len(ids) - 13)}
    assert {tuple(window[1:-1]) for window in windows} <= every
    assert len({tuple(window) for window in windows}) > 40
    assert windows[3] == views(pack=False)(text, draw(3))["x"].tolist()


def test_every_window_of_a_text_can_be_drawn(views, tokenizer):
    text = "a b c d e f g h i j k l m n o p"
    (ids,) = encode(tokenizer, [text])
    found = {tuple(views(pack=False)(text, draw(i))["x"].tolist()) for i in range(200)}
    assert found == {(0, *ids[i : i + 14].tolist(), 2) for i in range(len(ids) - 13)}
    assert len(views(max_tokens=len(ids) + 2, pack=False)(text, draw())["x"]) == len(ids) + 2


def test_padding_is_told_and_nothing_else_changes(views, tokenizer):
    every = views(pack=False, max_tokens=64)
    (view,) = every.collate(samples(every))
    rows = tokenizer(TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(view.x, rows["input_ids"])
    torch.testing.assert_close(view.pad, rows["attention_mask"] == 0)
    for i, text in enumerate(TEXTS):
        (alone,) = every.collate([every(text, draw(i))])
        assert alone.pad is None
        torch.testing.assert_close(view.x[i, : alone.x.shape[1]], alone.x[0])
        assert (view.x[i, alone.x.shape[1] :] == 1).all()
    plain = every.plain(TEXTS)
    assert (plain.x.tolist(), plain.pad.tolist(), plain.mask) == (view.x.tolist(), view.pad.tolist(), None)


def test_plain_is_the_beginning_of_a_text(views, tokenizer, corpus):
    text = max(corpus, key=len)
    view = views(pack=False).plain([text])
    assert view.x.tolist() == [tokenizer(text, truncation=True, max_length=16)["input_ids"]]
    assert view.pad is None
    assert views(pack=True).plain([np.array([7, 8])]).x.tolist() == [[0, 7, 8]]


@pytest.mark.parametrize(("ratio", "kept"), [(0.48, 266), (0.5, 256)])
def test_packed_blocks_keep_the_tokens_of_the_paper(views, ratio, kept):
    packed = views(max_tokens=512, mask=MaskOptions(ratio=ratio, copies=3))
    (view,) = packed.collate([packed(np.full(511, 9), draw(i)) for i in range(4)])
    assert view.mask.hidden.shape == (12, 512)
    assert ((~view.mask.hidden).sum(1) == kept).all()
    assert view.mask.keep.shape == (12, kept)
    assert len({tuple(row.tolist()) for row in view.mask.hidden}) == 12
    assert (packed.ragged, packed.longest) == (False, None)


@pytest.mark.parametrize("options", [{}, {"kind": "span", "ratio": 0.5}, {"kind": "span", "ratio": 0.9, "width": 6}])
def test_masks_of_padded_texts_cover_valid_tokens_only(views, options):
    every = views(pack=False, max_tokens=64, mask=MaskOptions(copies=5, **options))
    (view,) = every.collate(samples(every))
    pad = view.pad.repeat_interleave(5, 0)
    assert not (view.mask.hidden & pad).any()
    assert view.mask.hidden.any(1).all()
    assert ((~view.mask.hidden & ~pad).sum(1) > 0).all()
    if not options:
        length = (~view.pad).sum(1)
        kept = (~view.mask.hidden & ~pad).sum(1).view(-1, 5)
        assert (kept == (length * (1 - 0.48)).floor().long()[:, None]).all()
    assert (every.ragged, every.longest) == (True, 64)


def test_masks_depend_on_the_sample_and_not_on_its_place(views):
    every = views(pack=False, max_tokens=64, mask=MaskOptions(copies=2))
    made = samples(every)
    (view,) = every.collate(made)
    (other,) = every.collate([made[2], made[0]])
    n = len(made[2]["x"])
    assert view.mask.hidden[4:6, :n].tolist() == other.mask.hidden[:2, :n].tolist()
    (again,) = every.collate(samples(every))
    assert again.mask.hidden.tolist() == view.mask.hidden.tolist()


def test_spans_of_equally_long_rows_hide_as_many(views):
    packed = views(max_tokens=128, mask=MaskOptions("span", ratio=0.4, width=5, copies=2))
    made = [packed(np.full(127, 9), draw(i)) for i in range(8)]
    (view,) = packed.collate(made)
    alone = [packed.collate([sample])[0].mask.hidden for sample in made]
    counts = [int(hidden[0].sum()) for hidden in alone]
    assert len({*counts}) > 1
    assert (view.mask.hidden.sum(1) == min(counts)).all()
    for i, hidden in enumerate(alone):  # only ever unmasked, and not if it hid fewest
        assert not (view.mask.hidden[2 * i : 2 * i + 2] & ~hidden).any()
        assert counts[i] > min(counts) or view.mask.hidden[2 * i : 2 * i + 2].equal(hidden)


def test_spans_of_short_texts_are_narrower(views):
    every = views(pack=False, max_tokens=64, mask=MaskOptions("span", ratio=0.5, width=10))
    (view,) = every.collate([every("x", draw())])
    assert view.mask.hidden.sum(1).tolist() == [view.x.shape[1] - 1] * 8


def test_the_mask_token_is_never_an_input(views):
    every = views(pack=False, max_tokens=64, mask=MaskOptions(copies=2))
    texts = ["a <mask> b<pad>", "<mask><mask>", "</s> and <s> of a longer text without any end"]
    (view,) = every.collate(samples(every, texts))
    assert not (view.x == 999).any()
    assert ((view.x == 1) == view.pad).all()
    assert ((view.x == 0).sum(1) == 1).all()
    assert ((view.x == 2).sum(1) == 1).all()


def test_a_text_without_tokens_is_rejected(views, monkeypatch):
    monkeypatch.setattr("modalities.text.views.encode", lambda tokenizer, texts: [np.empty(0, np.int64)])
    for use in (lambda: views()("x", draw()), lambda: views().plain(["x"])):
        with pytest.raises(Rejected, match="empty: no token"):
            use()


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ({"ratio": 1.0}, "mask: ratio"),
        ({"ratio": 0.0}, "mask: ratio"),
        ({"copies": 0}, "mask: ratio must be above 0 and below 1, copies between 1 and 1024"),
        ({"width": 0}, "mask.width: 0"),
        ({"width": 16}, "mask.width: 16, must be between 1 and 15 tokens"),
    ],
)
def test_masks_that_cannot_be(views, mask, words):
    with pytest.raises(ValueError, match=words):
        views(mask=MaskOptions(**mask))


def test_the_tokenizer_is_loaded_when_it_is_needed(views, monkeypatch):
    lazy = views(name="org/name", pack=False, mask=MaskOptions())
    assert lazy.longest == 16

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", offline)
    with pytest.raises(ValueError, match=r"views.tokenizer: org/name is no folder here and cannot be loaded \(no network\)"):
        lazy("x", draw())
    with pytest.raises(
        ValueError, match=r"views.tokenizer: missing; train one with `mmssl tokenizer train data=.* out=FOLDER`"
    ):
        views(name=None).plain(["x"])


def test_the_tokenizer_must_fit_the_model(views):
    with pytest.raises(ValueError, match=r"model.vocab_size: 999, but .* has 1000 tokens"):
        views(vocab_size=999).tokenizer  # noqa: B018
    with pytest.raises(ValueError, match=r"model.pad_token_id: 3, but .* pads with 1"):
        views(pad_token_id=3).tokenizer  # noqa: B018
    assert len(views(vocab_size=1024).tokenizer) == 1000  # a table with rows to spare


def test_views_travel_to_workers(views):
    used = views(pack=False, mask=MaskOptions())
    used.plain(["x"])
    copy = pickle.loads(pickle.dumps(used))
    assert copy(TEXTS[2], draw())["x"].equal(used(TEXTS[2], draw())["x"])


def test_the_tokenizer_decides_the_models_vocabulary(trained_tokenizers, tokenizer, tmp_path):
    name = {"tokenizer": str(trained_tokenizers["unigram"])}
    ids = {"vocab_size": 1000, "pad_token_id": 1, "mask_token_id": 999, "bos_token_id": 0, "eos_token_id": 2}
    assert configure({"hidden_size": 8, "vocab_size": None}, name) == {"hidden_size": 8} | ids
    assert configure({}, name) == ids
    given = {"vocab_size": 50265}
    assert configure(given, {"tokenizer": "org/not-loaded"}) == given
    maskless = type(tokenizer).from_pretrained(name["tokenizer"])
    maskless.mask_token = None
    maskless.save_pretrained(tmp_path)
    assert configure({}, {"tokenizer": str(tmp_path)})["mask_token_id"] is None
    with pytest.raises(ValueError, match=r"views.tokenizer: missing"):
        configure({"vocab_size": None}, {})
    with pytest.raises(ValueError, match=r"views.tokenizer: there is no folder /none"):
        configure({}, {"tokenizer": "/none"})


def test_configured_features_take_the_views(trained_tokenizers):
    from modalities.text.features import TextFeatures

    name = str(trained_tokenizers["unigram"])
    features = TextFeatures(8, **configure({"max_tokens": 32}, {"tokenizer": name}))
    every = TextViews(features, name, pack=False)
    view = every.plain(TEXTS)
    assert features(view.x).shape == (*view.x.shape, 8)


def test_spans_never_ask_for_more_than_there_is():
    every = TextViews(
        SimpleNamespace(max_tokens=64, vocab_size=9, pad_token_id=1, mask_id=None), "unused", False, MaskOptions("span", 0.7)
    )
    for trial in range(30):
        lengths = torch.randint(3, 64, (6,), generator=generator("lengths", trial))
        rows = [{"x": torch.full((int(n),), 5), "seed": torch.tensor(trial * 6 + i)} for i, n in enumerate(lengths)]
        (view,) = every.collate(rows)  # Mask.of checks the counts
        assert view.mask.hidden.any(1).all()
