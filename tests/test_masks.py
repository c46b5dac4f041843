"""Masks over sequences; those over patches are in `vision/test_masks.py`."""

import math

import pytest
import torch

from mmssl import masks
from mmssl.masks import blocks, cover, span_count, spans, subsets, uniform, union
from mmssl.model.positions import restore
from mmssl.random import generator
from mmssl.types import Mask
from tests.losses.cases import MASKED

BASE, LARGE = (0.5, 5, 0.05), (0.55, 5, 0.1)  # ratio, width, adjust: speech, data2vec 2.0


def draws(setting, copies, *parts, length=999, make=blocks, inverse=False):
    return make((length,), copies, *setting, generator(*parts), inverse)


# Blocks


@pytest.mark.parametrize(("setting", "masked"), [(BASE, 499), (LARGE, 549)])
def test_blocks_hide_exactly_their_share(setting, masked):
    hidden = draws(setting, 300, "rows")
    assert (hidden.dtype, hidden.shape) == (torch.bool, (300, 999))
    assert set(hidden.sum(1).tolist()) == {masked}
    assert set((~draws(setting, 300, "rows", inverse=True)).sum(1).tolist()) == {math.floor(999 * (1 - setting[0]))}


@pytest.mark.parametrize(("setting", "share"), [(BASE, 0.421), (LARGE, 0.476)])
def test_segments_cover_as_much_as_the_authors_do(setting, share):
    covered = draws(setting, 4000, "coverage", make=cover).float().mean(1)
    assert abs(float(covered.mean()) - share) < 0.003


def test_topping_up_adds_what_the_authors_add():
    covered, hidden = draws(BASE, 2000, "top", make=cover), draws(BASE, 2000, "top")
    assert abs(float((hidden & ~covered).sum(1).float().mean()) - 78) < 2
    assert not bool((covered & ~hidden)[covered.sum(1) <= 499].any())  # nothing is taken back where there is room


@pytest.mark.parametrize(("length", "width"), [(7, 3), (8, 4), (5, 5), (9, 1)])
def test_segments_lie_around_their_centres_and_end_at_the_edge(length, width):
    one = (0.5, width, 1.999 * width / length - 0.5)  # a single centre
    possible = {frozenset(min(max(centre - width // 2 + i, 0), length - 1) for i in range(width)) for centre in range(length)}
    found = draws(one, 2000, "one", length=length, make=cover)
    assert {frozenset(row.nonzero().flatten().tolist()) for row in found} == possible


# Spans


@pytest.mark.parametrize(("ratio", "width", "share"), [(0.65, 10, 0.49), (0.5, 5, 0.41), (0.55, 5, 0.44)])
def test_spans_hide_as_much_as_the_authors_do(ratio, width, share):
    hidden = torch.cat([spans(1500, 1, ratio, width, generator("spans", i)) for i in range(300)])
    assert abs(float(hidden.float().mean()) - share) < 0.01


def test_single_rows_are_unions_of_whole_spans_that_start_in_range():
    for i in range(200):
        (row,) = spans(60, 1, 0.5, 7, generator("runs", i))
        runs = "".join("x" if h else " " for h in row.tolist()).split()
        assert all(len(run) >= 7 for run in runs)
        assert len(runs) <= math.floor(0.5 * 60 / 7 + 1)
        assert not bool(row[-1])  # starts lie in [0, L - w)


def test_the_number_of_spans_is_rounded_at_random():
    sums = [int(spans(1000, 1, 0.025, 10, generator("u", i)).sum()) for i in range(400)]  # 2.5 spans
    two = sum(s <= 20 for s in sums) / 400
    assert abs(two - 0.5) < 0.1  # 4 standard deviations


def test_there_is_at_least_one_span():
    assert spans(30, 4, 0.01, 5, generator("one")).sum(1).tolist() == [5] * 4


def test_rows_of_spans_are_made_equal_by_unmasking():
    hidden = spans(200, 64, 0.65, 10, generator("equal"))
    assert len(set(hidden.sum(1).tolist())) == 1
    assert len({tuple(row.tolist()) for row in hidden}) == 64
    assert 0 < int(hidden[0].sum()) < 0.49 * 200  # the row that hides fewest decides


def test_a_row_is_never_hidden_as_a_whole():
    for i in range(50):
        assert bool((~spans(8, 3, 1.0, 1, generator("whole", i))).any(1).all())


@pytest.mark.parametrize("length", [9, 10])
def test_a_span_must_fit(length):
    with pytest.raises(ValueError, match=r"^mask\.width: a span of 10"):
        spans(length, 1, 0.5, 10, generator(0))


def test_spans_are_joined_where_they_overlap():
    case = MASKED["span_union"]
    covered = union(torch.tensor(case["starts"]), case["span"], case["T"])
    assert covered.nonzero().flatten().tolist() == case["masked_indices"]
    assert int(covered.sum()) == case["count"]


@pytest.mark.parametrize("row", MASKED["span_start_counts"]["rows"], ids=lambda row: f"{row['T']}-{row['length']}")
def test_spans_are_as_many_as_those_of_the_authors(row):
    u = [0.0, 0.999 - row["ceil_probability"], 1.001 - row["ceil_probability"], 1 - 1e-9]
    counts = [span_count(row["T"], row["p"], row["length"], one) for one in u]
    assert counts == [row["floor"], row["floor"], row["floor"] + 1, row["floor"] + 1]
    assert row["last_start_exclusive"] == row["T"] - row["length"]


def test_examples_of_the_number_of_spans():
    case = MASKED["span_start_counts"]
    for row in case["static_u_examples"]:
        assert span_count(row["T"], row["p"], row["length"], row["u"]) == row["spans"]
    (row,) = case["coverage_ceiling_without_overlap"]
    assert span_count(row["T"], row["p"], 10, 0.0) * 10 == row["frames"]


def runs_of(hidden):
    """Mean length of the runs of masked tokens."""
    begins = hidden & ~torch.nn.functional.pad(hidden, (1, 0))[:, :-1]
    return float(hidden.sum() / begins.sum())


@pytest.mark.parametrize(("name", "method"), [("single_utterance", "wav2vec2"), ("single_utterance_hubert", "hubert")])
def test_masks_of_speech_have_the_statistics_of_the_authors(name, method):
    told = MASKED["wav2vec2_mask_statistics"]
    case, length = told[name], told["T"]
    alone = torch.cat([spans(length, 1, case["p"], case["length"], generator(name, i)) for i in range(400)])
    share = alone.float().mean(1)
    assert abs(float(share.mean()) - case["masked_fraction"]) < 0.006  # 4 standard errors
    assert abs(float(share.std()) - told["single_utterance"]["std"]) < 0.006
    assert abs(runs_of(alone) / case["mean_run"] - 1) < 0.04
    assert not bool(alone[:, -1].any())  # as told in `never_masked`
    four = torch.cat([spans(length, 4, case["p"], case["length"], generator(name, "four", i)) for i in range(150)])
    told = told["same_count_batch4"][method]
    assert abs(float(four.float().mean()) - told["masked_fraction"]) < 0.008
    assert abs(runs_of(four) / told["mean_run"] - 1) < 0.05


def test_spans_of_short_clips_hide_as_much_as_those_of_the_authors_where_there_are_as_many():
    """Theirs are at least two, which ours need not be; so over all pairs of starts where ours are one or two."""
    for row in MASKED["wav2vec2_mask_statistics"]["short_clips"]:
        length, width = row["T"], row["length"]
        if width == 10:
            pairs = torch.combinations(torch.arange(length - width))
            share = torch.stack([union(pair, width, length) for pair in pairs]).float().mean()
        else:
            share = torch.cat([spans(length, 1, 0.65, width, generator("short", width, i)) for i in range(400)]).float().mean()
        assert abs(float(share) - row["masked_fraction"]) < 0.02
        assert span_count(length, 0.65, width, 0.0) >= 1


# Independent tokens


@pytest.mark.parametrize(("ratio", "kept"), [(0.48, 266), (0.5, 256), (0.999, 1), (0.0001, 511)])
def test_uniform_masks_keep_their_share(ratio, kept):
    hidden = uniform(512, 50, ratio, generator("uniform"))
    assert (hidden.dtype, hidden.shape) == (torch.bool, (50, 512))
    assert set((~hidden).sum(1).tolist()) == {kept}


def test_uniform_masks_hide_every_token_as_often():
    hidden = uniform(20, 20_000, 0.4, generator("often")).float()
    assert bool(((hidden.mean(0) - 0.4).abs() < 5 * math.sqrt(0.24 / 20_000)).all())
    neighbours = (hidden[:, 1:] * hidden[:, :-1]).mean()  # without replacement: 8/20 * 7/19
    assert abs(float(neighbours) - 8 / 20 * 7 / 19) < 0.003


# All


@pytest.mark.parametrize(
    "make",
    [
        lambda draw: blocks((50,), 4, 0.5, 5, 0.05, draw),
        lambda draw: spans(50, 4, 0.5, 5, draw),
        lambda draw: uniform(50, 4, 0.5, draw),
    ],
)
def test_masks_repeat_with_their_key_and_change_with_it(make):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(make(generator(1)), make(generator(1)))
    assert not torch.equal(make(generator(1)), make(generator(2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_hides_what_it_hides_in_mae_and_fillers_go_where_they_belong(monkeypatch):
    case = MASKED["mae_masking"]
    monkeypatch.setattr(masks.torch, "rand", lambda *shape, generator: torch.tensor([case["noise"]]))
    hidden = uniform(8, 1, case["mask_ratio"], generator())
    monkeypatch.undo()
    assert hidden[0].tolist() == [bool(value) for value in case["mask"]]
    assert torch.tensor(case["noise"]).argsort().tolist() == case["ids_shuffle"]
    mask = Mask.of(hidden)
    assert mask.keep[0].tolist() == sorted(case["ids_keep"])  # ascending here, in the order of the noise there
    assert mask.keep.shape[1] == case["len_keep"]
    told = [int(name[1:]) if name != "M" else -1 for name in case["decoder_sequence_after_unshuffle"]]
    found = restore(mask.keep[..., None], torch.full((1, 6, 1), -1), mask)
    assert found.flatten().tolist() == told
    shuffled = torch.tensor(case["ids_shuffle"])
    assert torch.equal(shuffled[torch.tensor(case["ids_restore"])], torch.arange(8))


def test_counts_are_rounded_down_on_the_side_that_is_drawn():
    """CroCo and Point-MAE count what is hidden, as `blocks` do; MAE what is kept, as `uniform` does."""
    case = MASKED["croco_mask"]
    hidden = blocks((case["tokens"],), 5, case["ratio"], 1, 0.0, generator("croco"))
    assert set(hidden.sum(1).tolist()) == {case["masked"]}
    assert set((~hidden).sum(1).tolist()) == {case["visible"]}
    kept = (~uniform(case["tokens"], 5, case["ratio"], generator("mae"))).sum(1)
    assert set(kept.tolist()) == {case["mae_convention_would_keep"]}
    case = MASKED["point_mae"]
    hidden = blocks((case["groups"],), 5, case["mask_ratio"], 1, 0.0, generator("points"))
    assert set(hidden.sum(1).tolist()) == {case["masked"]}
    assert set((~hidden).sum(1).tolist()) == {case["visible"]}


def test_subsets_are_apart_from_what_is_seen_and_of_the_sizes_of_t_jepa():
    case = MASKED["tjepa_counts"]["jannis"]
    count = case["features"]
    context, target = ((case[f"min_{name}"] / count, case[f"max_{name}"] / count) for name in ("ctx", "trg"))
    sizes = set()
    for key in range(300):
        seen, wanted = subsets(count, 3, context, target, 4, generator("subsets", key))
        assert (seen.shape, wanted.shape[:2]) == ((3, count), (3, 4))
        assert not bool(seen.gather(1, wanted.flatten(1)).any())
        assert bool((wanted.diff(dim=2) > 0).all())
        assert len({tuple(row) for row in seen.tolist()}) == 3
        (size,) = set(seen.sum(1).tolist())
        sizes.add((size, wanted.shape[2]))
    assert all(a + b <= count for a, b in sizes)
    assert {min(a for a, _ in sizes), max(a for a, _ in sizes)} == {case["min_ctx"], case["max_ctx"]}
    assert {min(b for _, b in sizes), max(b for _, b in sizes)} == {case["min_trg"], case["max_trg"]}
    seen, wanted = subsets(10, 2, (0.5, 0.9), (0.5, 0.9), 2, generator("tight"))  # only the least sizes fit
    assert (seen.sum(1).tolist(), wanted.shape) == ([5, 5], (2, 2, 5))
    for shares in (((0.6, 0.7), (0.5, 0.6)), ((0.5, 0.2), (0.1, 0.2))):
        with pytest.raises(ValueError, match=r"^subsets: shares .* of 10 features"):
            subsets(10, 1, *shares, 2, generator("bad"))
