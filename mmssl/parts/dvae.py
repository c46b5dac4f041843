"""A small discrete variational autoencoder of images, trained before a method begins."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmssl import random
from mmssl.distributed import all_sum, rank, world

COLDEST, RATE = 1 / 16, 2e-3  # temperature of the last update; learning rate of the first, falls to 0


class Residual(nn.Module):
    """(B, D, h, w) -> (B, D, h, w)."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Add what the neighbours say."""
        return x + self.branch(x)


class DVAE(nn.Module):
    """Patches to logits of K codes, and codes to patches, by convolutions over the grid of patches.

    Values of a patch are channels: the first layer is a convolution with the stride of a patch, the last one its transpose.

    Args:
        values: n, of a patch.  codes: K.  width: channels in between.  grid: rows and columns of patches; an image of another
            number of patches is a square.
    Source: arXiv:2102.12092, section 2.1, of which this is a small version.
    """

    def __init__(self, values: int, codes: int, width: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.encoder = nn.Sequential(nn.Conv2d(values, width, 1), Residual(width), Residual(width), nn.Conv2d(width, codes, 1))
        self.decoder = nn.Sequential(nn.Conv2d(codes, width, 1), Residual(width), Residual(width), nn.Conv2d(width, values, 1))

    def encode(self, patches: Tensor) -> Tensor:
        """(B, L, n) -> logits (B, L, K)."""
        return self.encoder(self._laid_out(patches)).flatten(2).mT

    def decode(self, shares: Tensor) -> Tensor:
        """(B, L, K) shares of the codes, of each patch one or a mixture -> patches (B, L, n)."""
        return self.decoder(self._laid_out(shares)).flatten(2).mT

    def _laid_out(self, x: Tensor) -> Tensor:
        """(B, L, n) -> (B, n, h, w)."""
        length = x.shape[1]
        side = math.isqrt(length)
        return x.mT.unflatten(2, self.grid if length == self.grid[0] * self.grid[1] else (side, side))


class Training(NamedTuple):
    """How a DVAE is trained."""

    updates: int
    batch: int  # images
    kl: float  # weight of the divergence from even codes, in nats a patch; reached after half of the updates


@torch.enable_grad()
def train(net: DVAE, images: Tensor, how: Training, seed: int) -> None:
    """Rebuild images from codes that are drawn by the Gumbel-softmax, ever more sharply. The ranks share each batch.

    Args:
        net: with trainable weights, the same on all ranks.  images: (N, L, n), the same on all ranks.
    Source: arXiv:1611.01144 and 1611.00712; temperature and warm-up as in arXiv:2102.12092, appendix A.
    """
    parameters = [*net.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    draw = random.generator(seed, "dvae")
    for update in range(how.updates):
        done = update / max(how.updates - 1, 1)
        chosen = torch.randint(len(images), (how.batch,), generator=draw)
        mine = range(rank(), how.batch, world())
        keys = [random.key(seed, "dvae", update, place) for place in mine]
        x = images[chosen[list(mine)].to(images.device)]
        logits = net.encode(x)
        noise = random.uniform(keys, (*logits.shape[1:],), logits.device).to(logits.dtype)
        shares = ((logits + gumbel(noise)) / COLDEST**done).softmax(-1)
        error = (net.decode(shares) - x).square().mean((1, 2)).sum()
        log = logits.log_softmax(-1)
        kl = (math.log(logits.shape[-1]) + (log.exp() * log).sum(-1)).mean(1).sum()
        loss = (error + how.kl * min(1.0, 2 * done) * kl) / how.batch
        gradients = torch.autograd.grad(loss, parameters)
        whole = all_sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, gradient in zip(parameters, whole.split([p.numel() for p in parameters])):
            parameter.grad = gradient.view_as(parameter)
        optimizer.param_groups[0]["lr"] = RATE * (1 - done)
        optimizer.step()


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from numbers in [0, 1)."""
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()


def frozen(module: nn.Module) -> nn.Module:
    """The module with buffers in place of parameters, which no optimizer and no partitioning touches; changed in place."""
    for inner in module.modules():
        for name, parameter in [*inner.named_parameters(recurse=False)]:
            delattr(inner, name)
            inner.register_buffer(name, parameter.detach())
    return module
