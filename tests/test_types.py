import pickle

import pytest
import torch
from torch.testing import assert_close

from mmssl.model.positions import restore, take
from mmssl.types import Batch, Mask, Rejected, View


def mask_of(*rows: str) -> Mask:
    """x = hidden, . = visible."""
    return Mask.of(torch.tensor([[c == "x" for c in row] for row in rows]))


def test_a_mask_lists_visible_positions_in_ascending_order():
    mask = mask_of(".xx.x", "xx..x")
    assert mask.keep.tolist() == [[0, 3], [2, 3]]
    assert mask.count == 3
    # visible tokens come first, hidden ones after: position p is filled from place restore[p] of that list
    assert mask.restore.tolist() == [[0, 2, 3, 1, 4], [2, 3, 0, 1, 4]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [(("xx.", "x.."), "between 1 and 2"), (("xxx", "xxx"), "0 of 3"), (("...", "..."), "3 of 3"), (("x..", "xxx"), "0 and 2")],
)
def test_a_mask_that_cannot_be_used_is_refused(rows, words):
    with pytest.raises(ValueError, match=f"^mask: .*{words}"):
        mask_of(*rows)


def test_restoring_what_was_taken_is_the_identity_on_visible_tokens_and_puts_fillers_elsewhere():
    hidden = torch.rand(6, 11, generator=torch.Generator().manual_seed(0)).argsort(1) < 7
    mask, tokens = Mask.of(hidden), torch.arange(2 * 11 * 3.0).view(2, 11, 3)
    back = restore(take(tokens, mask), torch.full((6, 7, 3), -1.0), mask)
    for row in range(6):
        for position in range(11):
            wanted = torch.full((3,), -1.0) if hidden[row, position] else tokens[row // 3, position]
            assert torch.equal(back[row, position], wanted)


def test_fillers_are_placed_in_their_own_order():
    fillers = torch.tensor([10.0, 11, 12])[None, :, None]
    assert restore(torch.tensor([[[1.0], [2.0]]]), fillers, mask_of(".xx.x")).flatten().tolist() == [1, 10, 11, 2, 12]


def padded(*rows: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x = hidden, . = visible, space = padding."""
    return torch.tensor([[c == "x" for c in r] for r in rows]), torch.tensor([[c == " " for c in r] for r in rows])


def test_a_row_that_keeps_fewer_tokens_keeps_padding_to_be_as_long_as_the_others():
    mask = Mask.of(*padded("x.x..x", "..x.  ", ".x    ", "x..x. "))
    assert mask.keep.tolist() == [[1, 3, 4], [0, 1, 3], [0, 2, 3], [1, 2, 4]]
    assert mask.count == 3
    assert mask.restore.tolist() == [[3, 0, 4, 1, 2, 5], [0, 1, 3, 2, 4, 5], [0, 3, 1, 2, 4, 5], [3, 0, 1, 4, 2, 5]]


def test_masks_of_padded_rows_keep_what_is_visible_and_restore_everything():
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(2, 12, (4, 1), generator=draw)
        pad = torch.arange(12) >= lengths
        pad[0] = False
        scores = torch.rand(8, 12, generator=draw).masked_fill(pad.repeat_interleave(2, 0), 2.0)
        hidden = scores.argsort(1).argsort(1) < (lengths // 2).clamp(min=1).repeat_interleave(2, 0)
        hidden[:2] = scores[:2].argsort(1).argsort(1) < 6
        mask, wide = Mask.of(hidden, pad), pad.repeat_interleave(2, 0)
        kept = (~hidden & ~wide).sum(1)
        assert mask.keep.shape == (8, int(kept.max()))
        for row in range(8):
            keep = mask.keep[row]
            assert bool((keep.diff() > 0).all())
            visible = (~hidden & ~wide)[row].nonzero().flatten()
            assert set(visible.tolist()) <= set(keep.tolist())
            assert not bool(hidden[row, keep].any())
            assert int(wide[row, keep].sum()) == mask.keep.shape[1] - int(kept[row])  # as much padding as is needed
            assert sorted(mask.restore[row].tolist()) == list(range(12))
            assert mask.restore[row, keep].tolist() == list(range(len(keep)))


def test_padding_changes_nothing_where_there_is_none():
    hidden = torch.rand(6, 11, generator=torch.Generator().manual_seed(0)).argsort(1) < 7
    assert_close(tuple(Mask.of(hidden, torch.zeros(3, 11).bool())), tuple(Mask.of(hidden)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (("x.....", "xxx.  "), "between 1 and 5 tokens"),  # two places of padding cannot make up for four
        (("xx.", "xx "), "0 of 3"),
        (("x..", ".. "), "2 of 3"),
    ],
)
def test_padded_rows_that_cannot_be_made_equal_are_refused(rows, words):
    with pytest.raises(ValueError, match=f"^mask: .*{words}"):
        Mask.of(*padded(*rows))


def test_padding_must_not_be_masked():
    hidden, pad = padded("x..", ".x ")
    hidden[1, 2] = True
    with pytest.raises(ValueError, match=r"^mask: padding must not be masked"):
        Mask.of(hidden, pad)


def test_a_batch_survives_the_journey_as_flat_tensors():
    mask = mask_of("x.", "x.", ".x", ".x")
    pad = torch.tensor([[False, True], [False, False]])
    views = [View(torch.full((2, 1), float(i)), "speech") for i in range(11)]  # "10" sorts before "2" as text
    views[3] = views[3]._replace(pad=pad, mask=mask)
    batch = Batch(views, torch.tensor([5, 7]))
    flat = batch.tensors()
    assert all(isinstance(tensor, torch.Tensor) for tensor in flat.values())
    back = Batch.from_tensors(flat, (1, 2))
    assert (back.keys, back.index.tolist(), len(back.views)) == ((1, 2), [5, 7], 11)
    for before, after in zip(views, back.views):
        assert after.modality == "speech"
        assert_close(after.x, before.x, rtol=0, atol=0)
    assert [view.mask is not None for view in back.views] == [i == 3 for i in range(11)]
    assert_close(tuple(back.views[3].mask), tuple(mask), rtol=0, atol=0)
    assert torch.equal(back.views[3].pad, pad)
    assert (back.views[3].copies, back.views[0].copies) == (2, 1)


def test_a_rejection_survives_pickling_and_knows_its_kinds():
    error = pickle.loads(pickle.dumps(Rejected("too_large", "9 x 9")))
    assert (error.kind, error.reason, str(error)) == ("too_large", "9 x 9", "too_large: 9 x 9")
    with pytest.raises(ValueError, match="unknown kind 'ugly'"):
        Rejected("ugly")
