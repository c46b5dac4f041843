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
