"""What holds kinds of data together, by itself; whole runs are in tests/training/test_pairs.py."""

import math

import pytest
import torch
from torch.testing import assert_close

from mmssl.methods.bind import WARMEST, Binding
from tests.ranks import on_two_ranks


def bound(rank: int | None, loss: str, start: float) -> dict[str, torch.Tensor]:
    """Loss and gradients of a binding of three kinds of data for the rows of a rank, or for all."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 6, 5, generator=draw, dtype=torch.float64)
    x = torch.randn(3, 8, 6, generator=draw, dtype=torch.float64)
    index = torch.arange(8).repeat(3, 1)
    index[1, 3], index[2, 6] = 5, 0  # replaced
    content = torch.stack([torch.arange(8), torch.arange(8) % 3, torch.arange(8) + 10])
    rows = slice(rank, None, 2) if rank is not None else slice(None)
    names, binding = ("a", "b", "c"), Binding(loss, start).double()
    weights.requires_grad_()
    z = {name: (x[i] @ weights[i])[rows] for i, name in enumerate(names)}
    ids, same = ({name: t[i][rows] for i, name in enumerate(names)} for t in (index, content))
    out = binding(z, ids, same)
    total = torch.stack([value for name, value in out.items() if name.startswith("loss/")]).sum()
    inputs = [weights, *binding.parameters()]
    return {"loss": total.detach(), **{str(i): g for i, g in enumerate(torch.autograd.grad(total, inputs))}}


def both(rank: int) -> list[dict[str, torch.Tensor]]:
    return [bound(rank, *case) for case in CASES]


CASES = [("infonce", 0.2), ("sigmoid", 0.1), ("infonce", 0.01)]


@pytest.mark.distributed
def test_a_binding_of_two_ranks_is_that_of_one(tmp_path):
    for case, first, second in zip(CASES, *on_two_ranks(both, folder=tmp_path), strict=True):
        for name, expected in bound(None, *case).items():
            assert_close((first[name] + second[name]) / 2, expected, rtol=1e-9, atol=1e-12, msg=f"{case} {name}")


def test_the_scale_never_rises_above_its_cap_and_comes_back():
    binding = Binding("infonce", 0.01)
    z = {"a": torch.eye(4), "b": torch.eye(4)}
    ids = {name: torch.arange(4) for name in z}

    def gradient(b: torch.Tensor) -> float:
        binding.zero_grad()
        out = binding({"a": z["a"], "b": b}, ids, ids)
        assert float(out["health/scale"]) == pytest.approx(100, rel=1e-5)
        out["loss/a-b"].backward()
        return float(binding.scale.grad)

    assert tuple(binding.scale.shape) == (1,)
    binding.scale.data.fill_(WARMEST + 0.5)
    assert gradient(torch.eye(4) + 30.0) == 0  # right: it would rise
    assert gradient(torch.eye(4)[[1, 2, 3, 0]]) > 0  # wrong: it falls again


def test_papers_start_where_they_say_and_what_cannot_be_is_refused():
    assert float(Binding().scale.detach().exp()) == pytest.approx(1 / 0.07)
    sigmoid = Binding("sigmoid")
    assert float(sigmoid.scale.detach()) == pytest.approx(math.log(10))
    assert float(sigmoid.bias.detach()) == -10
    assert Binding("sigmoid", 0.001).scale.shape == (1,)
    with pytest.raises(ValueError, match=r"temperature: 0\.001, infonce keeps it at 0\.01 or above"):
        Binding("infonce", 0.001)


def test_the_same_content_is_what_the_option_says():
    z = {"a": torch.eye(3), "b": torch.eye(3)[[1, 0, 2]]}
    index = dict.fromkeys(z, torch.arange(3))
    content = {"a": torch.arange(3), "b": torch.tensor([7, 7, 8])}  # of rows 0 and 1 the same on one side
    found = {same: float(Binding(temperature=1.0, same=same)(z, index, content)["loss/a-b"].detach()) for same in ANSWERS}
    assert found == pytest.approx(ANSWERS, rel=1e-6)


E = math.e
ANSWERS = {  # rows 0 and 1 have the cosine 0 with their own side, 1 with each other's; row 2 has 1 with its own
    "leave_out": (2 * math.log(2) + math.log((E + 2) / E)) / 3,
    "positive": (2 * (math.log(E + 2) - 0.5) + math.log((E + 2) / E)) / 3,
    "negative": (2 * math.log(E + 2) + math.log((E + 2) / E)) / 3,
}
