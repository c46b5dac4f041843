"""A step of a joint-embedding method, or its loss alone, against lightly's losses and momentum update on the same networks."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl import losses
from mmssl.config import Recipe
from mmssl.random import generator
from mmssl.types import Batch, View
from tools.bench.peers import CLOCK, Pair, Side, own_side
from tools.bench.turns import by_turns, forget_peak, high_water, resident

WIDE = {  # heads of a size at which they count, beside the small encoder of the recipe
    "simclr": ("method.hidden=2048", "method.dim=128"),
    "byol": ("method.hidden=4096", "method.dim=256"),
    "vicreg": ("method.hidden=2048", "method.dim=2048"),
    "barlow_twins": ("method.hidden=2048", "method.dim=2048"),
    "swav": ("method.hidden=2048", "method.dim=128", "method.prototypes=512"),
    "dino": ("method.hidden=2048", "method.bottleneck=256", "method.prototypes=4096", "method.head_norm=false"),
}


def run(method: str = "simclr", part: str = "step", batch: str = "128", dim: str = "2048", pairs: str = "7",
        device: str = "cpu", memory: str = "true") -> dict[str, Any]:  # fmt: skip
    """By turns, in fp32: whole steps (forward, backward, AdamW, teacher), or value and gradient of the loss alone.

    Args:
        method: simclr, byol, vicreg, barlow_twins, swav or dino, with the encoder of `vision/METHOD-cifar10-cpu`.
        part: step, or loss. Theirs is the loop of lightly's examples over a copy of our networks, the backbone as its library
            runs it; or its loss.
        batch: samples.  dim: of the projections, or the number of prototypes, of `part=loss`.
    Returns: `time_ratio` (ours : lightly, median over pairs), its spread, `memory_ratio` at the peak with `part=loss`, and
        both losses before the first step, which must agree to 1e-4.
    """
    ways: dict[str, Callable[[], Any]]
    if part == "step":
        both = pair(method, int(batch), device)._asdict()
        values = {name: side.check() for name, side in both.items()}
        ways = {name: side.step for name, side in both.items()}
    else:
        ways = alone(method, int(batch), int(dim), device)
        values = {name: way() for name, way in ways.items()}
    found: dict[str, Any] = {"name": f"{part} of {method}, batch {batch}, {device}"}
    apart = abs(values["ours"] - values["theirs"]) / abs(values["theirs"])
    if apart > 1e-4:
        raise RuntimeError(f"the two sides compute different losses, {values}; there is nothing to time")
    found |= by_turns(ways, int(pairs), warm=2).figures()
    if part == "loss" and memory == "true" and device == "cpu":
        peaks = {name: _peak(name, method, batch, dim) for name in ways}
        found["memory_ratio"] = round(peaks["ours"] / peaks["theirs"], 3)
        found["mebibytes"] = {name: round(value / 2**20, 1) for name, value in peaks.items()}
    found |= {"loss": values, "loss_difference": apart, "peer": "lightly", "peer_version": lightly().__version__}
    return found


def pair(name: str, samples: int, device: str) -> Pair:
    """Our step and lightly's loop, from the same weights, on the same two views."""
    recipe = Recipe.load(f"vision/{name}-cifar10-cpu", *WIDE[name])
    method: Any = recipe.build().to(device).train()
    shape = (samples, 3, recipe.config().image_size, recipe.config().image_size)
    views = [View(torch.randn(shape, generator=generator("bench", i)).to(device), "vision") for i in range(2)]
    other = copy.deepcopy(method)
    backbone = other.student.encoder
    backbone.outputs = MethodType(as_it_is, backbone)
    loss, after = LOOPS[name](other, views)
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], recipe.optim.lr, fused=True)
    batch = Batch(views, torch.arange(samples), tuple(range(samples)))
    ours = own_side(f"{name}, small ResNet", recipe, method, batch)
    return Pair(ours, Side("lightly's loop", other, loss, loss, optimizer, after=after))


def as_it_is(backbone: Any, x: Tensor, layers: bool = False) -> tuple[Tensor, Tensor, None]:
    """What a network of a library gives, in its own layout of memory."""
    out = backbone.model(x)
    return out.last_hidden_state, out.pooler_output.flatten(1), None


def lightly(part: str = "") -> Any:
    """A module of it."""
    try:
        return importlib.import_module(f"lightly.{part}".rstrip("."))
    except ImportError:
        sys.exit("lightly is not installed; `make bench` makes an environment that has it")


Loop = tuple[Callable[[], Tensor], Callable[[], None]]  # the loss, and what comes after the optimizer's step


def _simclr(method: Any, views: list[View]) -> Loop:
    net, criterion = method.student, lightly("loss").NTXentLoss(method.temperature)
    return lambda: criterion(*net.project_all(net.embed_all(views))), lambda: None


def _two(method: Any, views: list[View], criterion: Callable[[Tensor, Tensor], Tensor]) -> Loop:
    """One pass for each view."""
    net = method.student
    return lambda: criterion(*(net.project(net.embed(view)) for view in views)), lambda: None


def _vicreg(method: Any, views: list[View]) -> Loop:
    return _two(method, views, lightly("loss").VICRegLoss())


def _barlow(method: Any, views: list[View]) -> Loop:
    return _two(method, views, lightly("loss").BarlowTwinsLoss(method.off_diagonal))


def _byol(method: Any, views: list[View]) -> Loop:
    net, criterion = method.student, lightly("loss").NegativeCosineSimilarity()
    teacher, after = _teacher(method)

    def loss() -> Tensor:
        p1, p2 = (method.predictor(net.project(net.embed(view))) for view in views)
        with torch.no_grad():
            t1, t2 = (teacher.project(teacher.embed(view)) for view in views)
        return 4 + 2 * (criterion(p1, t2) + criterion(p2, t1))  # 2 - 2 cos of each, as the paper has it

    return loss, after


def _dino(method: Any, views: list[View]) -> Loop:
    net, criterion = (
        method.student,
        lightly("loss").DINOLoss(len(method.center.value), student_temp=method.temperature).to(views[0].x.device),
    )
    (teacher, after), sharp = _teacher(method), method.teacher_temperature(CLOCK)

    def loss() -> Tensor:
        with torch.no_grad():
            targets = teacher.project_all(teacher.embed_all(views))
        return criterion([*targets], [*net.project_all(net.embed_all(views))], teacher_temp=sharp)

    return loss, after


def _swav(method: Any, views: list[View]) -> Loop:
    net, (count, dim) = method.student, method.prototypes.weight.shape
    prototypes = lightly("models.modules").SwaVPrototypes(dim, count).to(views[0].x.device)
    prototypes.heads[0] = torch.nn.Linear(dim, count, bias=False, device=views[0].x.device)
    prototypes.heads[0].weight.data.copy_(method.prototypes.weight)
    method.prototypes, criterion = prototypes, lightly("loss").SwaVLoss(method.temperature, method.iterations, method.eps)

    def loss() -> Tensor:
        prototypes.normalize()
        z = F.normalize(torch.cat([*net.project_all(net.embed_all(views))]))
        return criterion([*prototypes(z).chunk(2)], []).squeeze()

    return loss, lambda: None


def _teacher(method: Any) -> tuple[Any, Callable[[], None]]:
    """A copy that follows the student by lightly's update."""
    teacher = copy.deepcopy(method.student)
    teacher.requires_grad_(False)
    momentum = method.teacher.momentum(CLOCK)
    del method.teacher
    return teacher, lambda: lightly("models.utils").update_momentum(method.student, teacher, momentum)


LOOPS: dict[str, Callable[[Any, list[View]], Loop]] = {
    "simclr": _simclr, "byol": _byol, "vicreg": _vicreg, "barlow_twins": _barlow, "swav": _swav, "dino": _dino,
}  # fmt: skip


def alone(name: str, samples: int, dim: int, device: str) -> dict[str, Callable[[], float]]:
    """Our loss and lightly's, each with its gradient for both batches of vectors, or the first where the second are targets."""
    vectors = [torch.randn(samples, dim, generator=generator("bench", i)).to(device) for i in range(2)]
    mine, theirs = (way[name] for way in (OURS, _lightly(dim)))

    def way(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], float]:
        def once() -> float:
            value = loss(*(z.clone().requires_grad_(i == 0 or name != "byol") for i, z in enumerate(vectors)))
            value.backward()
            return float(value.detach())

        return once

    return {"ours": way(mine), "theirs": way(theirs)}


def _swapped(s1: Tensor, s2: Tensor) -> Tensor:
    return losses.swav([s1, s2], {i: losses.sinkhorn(s.detach()) for i, s in enumerate((s1, s2))})


def _variance(z1: Tensor, z2: Tensor) -> Tensor:
    found = losses.vicreg(z1, z2)
    return 25 * found.invariance + 25 * found.variance + found.covariance


OURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "simclr": lambda z1, z2: losses.nt_xent(z1, z2, 0.5),
    "byol": lambda z1, z2: losses.cosine_regression(z1, z2),
    "vicreg": _variance,
    "barlow_twins": lambda z1, z2: losses.barlow_twins(z1, z2, 0.005),
    "swav": lambda z1, z2: _swapped(z1 / z1.shape[1] ** 0.5, z2 / z1.shape[1] ** 0.5),
    "dino": lambda z1, z2: losses.dino([z1, z2], [z2, z1], z1.new_zeros(z1.shape[1]), 0.1, 0.07),
}


def _lightly(dim: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    of = lightly("loss")
    dino, swav, cosine = of.DINOLoss(dim), of.SwaVLoss(), of.NegativeCosineSimilarity()
    return {
        "simclr": of.NTXentLoss(0.5),
        "byol": lambda z1, z2: 2 + 2 * cosine(z1, z2),
        "vicreg": of.VICRegLoss(),
        "barlow_twins": of.BarlowTwinsLoss(0.005),
        "swav": lambda z1, z2: swav([z1 / dim**0.5, z2 / dim**0.5], []).squeeze(),
        "dino": lambda z1, z2: dino([z2.detach(), z1.detach()], [z1, z2], teacher_temp=0.07),
    }


def _peak(side: str, *words: str) -> int:
    """Bytes of a loss and its gradient beyond what stood before, in a fresh process."""
    done = subprocess.run([sys.executable, "-m", __name__, side, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(side: str, method: str, batch: str, dim: str) -> int:
    small, way = (alone(method, int(n), int(dim), "cpu")[side] for n in ("8", batch))
    small()  # what libraries take once
    forget_peak()
    before = resident()
    way()
    return high_water() - before


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
