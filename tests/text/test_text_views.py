import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmssl.data.dataset import KeyedDataset
from mmssl.data.quarantine import Quarantine
from mmssl.random import generator
from mmssl.types import Batch, Rejected
from modalities.text import DEFAULTS, TextViews
from modalities.text.augment import POLICIES, Crop, one_by_one, view
from modalities.text.features import TextFeatures
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


def test_a_single_view_is_drawn_as_ever(views, tokenizer, corpus):
    """First the window, then the seed; runs that were begun before there were several views go on as they were."""
    text, source = max(corpus, key=len), generator("text", 5, 0)
    (ids,) = encode(tokenizer, [text])
    start = int(torch.randint(len(ids) + 1 - 14, (), generator=source))
    made = views(pack=False)(text, draw(5))
    assert [*made] == ["x", "seed"]
    assert made["x"].tolist() == [0, *ids[start : start + 14].tolist(), 2]
    assert int(made["seed"]) == int(torch.randint(1 << 62, (), generator=source))


# Several views -----------------------------------------------------------------------------------------------------------


def test_a_run_of_tokens_is_kept_as_recorded():
    tokens, found = torch.arange(100, 150), []
    for i in range(400):
        run, record = view(tokens, Crop(span=(0.2, 0.6)), generator("span", i))
        start = int(record["start"])
        assert run.equal(tokens[start : start + len(run)])
        assert record["kept"] == len(run) / 50
        found.append((len(run), start))
    lengths = np.array([length for length, _ in found])
    assert (lengths.min(), lengths.max()) == (10, 30)
    assert abs(lengths.mean() - 20) < 4 * 20 / np.sqrt(12 * 400)
    places = np.array([start / (50 - length) for length, start in found])
    assert places.min() == 0
    assert places.max() == 1
    assert abs(places.mean() - 0.5) < 4 / np.sqrt(12 * 400)


def test_tokens_are_left_out_with_their_chance_and_stay_in_order():
    tokens, kept = torch.arange(1000), 0
    for i in range(20):
        run, record = view(tokens, Crop(drop=0.3), generator("drop", i))
        assert run.equal(run.sort().values)
        assert (record["start"], record["kept"]) == (0.0, len(run) / 1000)
        kept += len(run)
    assert abs(kept / 20_000 - 0.7) < 4 * np.sqrt(0.3 * 0.7 / 20_000)


def test_a_few_tokens_stay_of_every_text():
    for count in (1, 3, 4, 5, 9):
        for i in range(50):
            run, _ = view(torch.arange(count), Crop(span=(0.01, 0.02), drop=0.99), generator("few", i))
            assert len(run) == min(count, 4)
    shortest = min(len(view(torch.arange(40), Crop(drop=0.9), generator("fewer", i))[0]) for i in range(200))
    assert shortest == 4


def test_dropout_pairs_are_twice_the_same(views, tokenizer):
    every = views(pack=False, max_tokens=64, crops="dropout")
    assert (every.count, every.crops) == (2, 0)
    one, two = every.collate(samples(every))
    rows = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for each in (one, two):
        assert each.x.equal(rows["input_ids"])
        assert each.pad.equal(rows["attention_mask"] == 0)
        assert each.record["start"].tolist() == [0, 0, 0, 0]
        assert each.record["kept"].tolist() == [1, 1, 1, 1]


def test_pairs_of_a_long_text_are_of_one_window(views, corpus):
    text, used = max(corpus, key=len), views(pack=False, crops="dropout")
    made = [used(text, draw(i)) for i in range(20)]
    assert all(sample["0.x"].equal(sample["1.x"]) for sample in made)
    assert len({tuple(sample["0.x"].tolist()) for sample in made}) > 15
    one, two = used.collate(made)
    assert one.record["start"].equal(two.record["start"])
    assert len(one.record["start"].unique()) > 15


def test_every_view_is_padded_for_itself_and_keeps_beginning_and_end(views, tokenizer):
    every, texts = views(pack=False, max_tokens=64, crops="span-drop"), TEXTS[2:] * 6
    made = samples(every, texts)
    batch = every.collate(made)
    assert batch[0].x.shape != batch[1].x.shape or not batch[0].x.equal(batch[1].x)
    for i, each in enumerate(batch):
        lengths = torch.tensor([len(sample[f"{i}.x"]) for sample in made])
        assert each.x.shape[1] == int(lengths.max())
        assert each.pad.equal(torch.arange(each.x.shape[1]) >= lengths[:, None])
        assert (each.x[:, 0] == 0).all()
        assert (each.x.gather(1, lengths[:, None] - 1) == 2).all()
        assert (each.x[each.pad] == 1).all()
        for row, kept, text, length in zip(each.x, each.record["kept"], texts, lengths):
            whole = tokenizer(text)["input_ids"][1:-1]
            assert round(float(kept) * len(whole)) == int(length) - 2
            remaining = iter(whole)  # a subsequence of the text
            assert all(token in remaining for token in row[1 : int(length) - 1].tolist())
    assert not batch[0].record["start"].equal(batch[1].record["start"])


def test_a_packed_block_has_a_beginning_only(views):
    used = views(max_tokens=31, crops=[Crop(2, span=(0.5, 0.5))])
    made = [used(np.arange(10, 40), draw(i)) for i in range(4)]
    one, two = used.collate(made)
    assert one.x.shape == two.x.shape == (4, 16)
    assert one.pad is two.pad is None
    assert (one.x[:, 0] == 0).all()
    assert (one.x[:, 1:] == one.x[:, 1:2] + torch.arange(15)).all()
    assert (one.x[:, 1] - 10).tolist() == one.record["start"].tolist()
    assert (used.ragged, used.longest) == (False, None)
    (text, _) = used.collate([used("the value", draw())])
    assert text.x[0, -1] == 2  # a text is closed


def test_views_depend_on_their_key_alone_and_not_on_other_views(views):
    text, before = TEXTS[3], torch.get_rng_state()
    two, six = (
        views(pack=False, max_tokens=64, crops=[Crop(2, (0.3, 1.0), 0.1), *more]) for more in ([], [Crop(4, (0.1, 0.3))])
    )
    a, b, again, other = two(text, draw(1)), six(text, draw(1)), two(text, draw(1)), two(text, draw(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(a[name].equal(b[name]) and a[name].equal(again[name]) for name in a)
    assert not a["0.x"].equal(a["1.x"])
    assert not a["0.x"].equal(other["0.x"])
    assert (six.count, six.crops) == (2, 4)


def test_smaller_crops_come_last_and_without_masks(views):
    used = views(pack=False, max_tokens=64, mask=MaskOptions(copies=3), crops=[Crop(2, (0.2, 0.4)), Crop(2, (0.5, 1.0))])
    assert [crop.span for crop in used.kinds] == [(0.5, 1.0), (0.5, 1.0), (0.2, 0.4), (0.2, 0.4)]
    batch = used.collate(samples(used))
    assert [each.copies if each.mask else 0 for each in batch] == [3, 3, 0, 0]
    for each in batch[:2]:
        assert each.mask.hidden.shape == (12, each.x.shape[1])
        assert not (each.mask.hidden & each.pad.repeat_interleave(3, 0)).any()


def test_a_text_without_tokens_has_no_views(views):
    with pytest.raises(Rejected, match="empty: no token"):
        views(pack=False, crops="span")(np.array([0, 2]), draw())


class Texts:
    """As much of a source as a data set asks for."""

    size, lengths, paired = 4, None, False
    value = staticmethod(lambda index: TEXTS[index])
    label_at = staticmethod(lambda index: -1)
    identity = staticmethod(str)


def test_two_workers_and_none_give_the_same_batches(views):
    used = views(pack=False, max_tokens=64, crops="multi")
    data = KeyedDataset(Texts(), SimpleNamespace(decode=lambda text: text), used, 0, Quarantine(None, 0, 0))
    keys = [[(0, 3), (0, 1)], [(0, 2), (0, 0)], [(1, 3), (1, 1)]]
    own, theirs = ([*DataLoader(data, batch_sampler=keys, collate_fn=data.collate, num_workers=workers)] for workers in (0, 2))
    for one, other in zip(own, theirs, strict=True):
        assert {*one} == {*other}
        assert all(one[name].equal(other[name]) for name in one)
    assert not own[0]["0.text.x"].equal(own[2]["0.text.x"])  # another epoch
    back = Batch.from_tensors(own[0]).views
    assert [{*each.record} for each in back] == [{"start", "kept"}] * 6


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


@pytest.mark.parametrize(
    ("crops", "words"),
    [
        ("span_drop", "crops: 'span_drop' is no known policy (did you mean span-drop?); known are dropout, "),
        ([], "crops: none are listed; name a policy, one of dropout, "),
        ([Crop(), Crop(0)], "crops.1.count: 0, must be between 1 and 64"),
        ([Crop(span=(0.0, 0.5))], "crops.0.span: [0.0, 0.5], must be two shares"),
        ([Crop(span=(0.5, 0.4))], "crops.0.span"),
        ([Crop(span=(0.5, 1.1))], "crops.0.span"),
        ([Crop(drop=1.0)], "crops.0.drop: 1.0, must be a chance"),
        ([Crop(drop=-0.1)], "crops.0.drop"),
        ([Crop(drop=float("nan"))], "crops.0.drop"),
    ],
)
def test_crops_that_cannot_be(views, crops, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        views(crops=crops)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_have_two_full_size_views(name):
    kinds, full = one_by_one(name)

    assert (full, len(kinds)) == ((2, 6) if name == "multi" else (2, 2))


@pytest.mark.parametrize("method", ["simclr", "byol", "barlow_twins", "vicreg", "swav", "dino"])
def test_defaults_of_joint_embedding_are_two_views_of_documents(views, method):
    used = views(**DEFAULTS[method]["views"])
    assert (used.count, used.crops, used.mask, used.pack) == (2, 0, None, False)
    assert DEFAULTS[method]["model"]["dropout"] == 0.1


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


def test_places_are_drawn_as_small_as_the_recipe_says():
    torch.manual_seed(0)
    features = TextFeatures(64, vocab_size=500, max_tokens=200, position_std=0.002)
    assert float(features.places.weight[2:].detach().std()) == pytest.approx(0.002, rel=0.05)
    assert float(features.tokens.weight[2:].detach().std()) == pytest.approx(0.02, rel=0.05)
    with pytest.raises(ValueError, match=r"^position_std: -1"):
        TextFeatures(64, vocab_size=500, position_std=-1)
