"""Steps as long as the weights allow: LARS and its relatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

Variant = Literal["outside", "classic", "popular", "paper", "larc", "larc_clip"]


class Lars(torch.optim.Optimizer):
    """SGD with momentum in which each tensor's step is scaled to its length: You et al. 2017, arXiv:1708.03888.

    With weights w, gradient g, weight decay b, d = g + b w and momentum buffer v:

    | variant | trust ratio q | update | used by |
    |---|---|---|---|
    | outside | trust |w| / |d| | v <- m v + q d; w <- w - lr v | BYOL, Barlow Twins, VICReg, MoCo v3, DINO |
    | classic | trust |w| / |d| | v <- m v + lr q d; w <- w - v | SimCLR |
    | popular | trust |w| / |v| | v <- m v + d; w <- w - lr q v | an option of SimCLR's code |
    | paper | trust |w| / (|g| + b |w|) | v <- m v + lr q d; w <- w - v | Eq. 6 |
    | larc | trust |w| / (|g| + b |w| + 1e-8) | v <- m v + q d; w <- w - lr v | apex: SwAV, DeepCluster v2 |
    | larc_clip | min(that / lr, 1) | as larc: never a longer step than SGD's | apex |

    Where w or the denominator is zero q is 1, so a matrix that starts from zero takes a step of lr g; larc leaves the raw
    gradient, without decay, where w or g is zero. Norms are taken in fp32 and stay on the device.

    Args:
        params: tensors or groups. A group with `adapt=False` takes plain steps without decay.
        trust: eta, the share of its length that a tensor may move at a rate of 1.
    Raises: ValueError for a 0-dimensional parameter in a group that adapts: it has no length to compare.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        variant: Variant = "outside",
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "variant": variant}
        super().__init__(params, defaults | {"adapt": True})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["adapt"] and any(p.ndim == 0 for p in group["params"]):
            raise ValueError("params: a 0-dimensional parameter has no length to compare; put it into a group with adapt=False")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if params:
                _update(group, params, [self.state[p]["momentum_buffer"] for p in params])
        return loss


def _update(group: dict[str, Any], params: list[Tensor], buffers: list[Tensor]) -> None:
    """One group, in place."""
    lr, variant, adapt = group["lr"], group["variant"], group["adapt"]
    inside = variant in ("classic", "paper")
    steps: list[Any] = _directions(group, params) if adapt else [p.grad for p in params]
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_add_(buffers, steps, alpha=lr if inside else 1)
    moves = buffers
    if adapt and variant == "popular":
        weights, lengths = _norms(params), _norms(buffers)
        ratios = torch.where((weights > 0) & (lengths > 0), group["trust"] * weights / lengths, 1)
        moves = torch._foreach_mul(buffers, list(ratios.unbind()))
    torch._foreach_add_(params, moves, alpha=-1 if inside else -lr)


def _directions(group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
    """q d of each parameter."""
    decay, variant = group["weight_decay"], group["variant"]
    grads: list[Any] = [p.grad for p in params]
    weights, slopes = _norms(params), _norms(grads)
    if variant.startswith("larc"):
        known, lengths = (weights > 0) & (slopes > 0), slopes + decay * weights + 1e-8
        directions = torch._foreach_addcmul(grads, params, list((decay * known.to(weights.dtype)).unbind()))
    else:
        directions = torch._foreach_add(grads, params, alpha=decay)
        lengths = slopes + decay * weights if variant == "paper" else _norms(directions)
        known = (weights > 0) & (lengths > 0)
    if variant == "popular":  # compares with the buffer, later
        return list(directions)
    ratios = group["trust"] * weights / lengths
    if variant == "larc_clip":
        ratios = (ratios / group["lr"]).clamp(max=1)  # infinite, hence 1, at a rate of 0
    torch._foreach_mul_(directions, list(torch.where(known, ratios, 1).unbind()))
    return list(directions)


def _norms(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """(tensors,) lengths, at least in fp32."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=wide))
