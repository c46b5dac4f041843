"""Ranks that would run different modules are stopped before they do, B3."""

import torch
from torch import nn

from mmssl.errors import RankError
from mmssl.training.order import END, SameOrder
from tests.ranks import on_two_ranks


class Towers(nn.Module):
    """Runs those that it is told to."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))

    def forward(self, names):
        return sum(getattr(self, name)(torch.ones(1, 4)).sum() for name in names)


def run(rank, orders):
    model = Towers()
    try:
        with SameOrder(model, torch.device("cpu")):
            model(orders[rank])
    except RankError as error:
        return str(error), error.code
    finally:
        assert not any(module._forward_pre_hooks for module in model.modules())
    return None


CASES = [
    ((["image", "text"], ["image", "text"]), None),
    ((["image"], ["text"]), ("text", "image")),
    ((["image", "text"], ["text", "image"]), ("text", "image")),
    ((["image", "text"], ["image"]), (END, "text")),
    ((["image"], ["image", "text"]), ("text", END)),
]


def all_cases(rank):
    model = Towers()
    model.text.compile(backend="eager")
    with SameOrder(model, torch.device("cpu")) as opened:
        hooked = len(opened.handles)
    return hooked, [run(rank, orders) for orders, _ in CASES]


def test_t08_the_first_module_that_ranks_do_not_share_is_named_on_all_of_them(tmp_path):
    for hooked, found in on_two_ranks(all_cases, folder=tmp_path):
        assert hooked == 2  # the whole and the image tower: what is compiled is left alone
        for (_, places), said in zip(CASES, found, strict=True):
            if places is None:
                assert said is None
            else:
                assert said[0].startswith(f"Rank 1 comes to {places[0]} where rank 0 comes to {places[1]}: ")
                assert said[1] == 7


def test_one_process_has_nothing_to_agree_on():
    model = Towers()
    with SameOrder(model, torch.device("cpu")) as opened:
        assert not opened.handles
        model(["image"])
