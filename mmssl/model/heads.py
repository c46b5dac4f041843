"""Projectors and predictors."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import nn

from mmssl.model.norm import BatchNorm

LastNorm = Literal["none", "affine", "scale", "plain"]


def mlp(
    *widths: int,
    bias: bool = True,
    norm: bool = True,
    last_bias: bool | None = None,
    last_norm: LastNorm = "none",
    activation: Literal["relu", "gelu"] = "relu",
    std: float | None = None,
) -> nn.Sequential:
    """Linear layers; between them batch normalisation over all ranks and an activation.

    Args:
        widths: of the input, of each hidden layer and of the output.
        bias, norm: of hidden layers.
        last_bias: of the last layer; as the hidden ones if None.
        last_norm: batch normalisation of the output: with weight and offset, with a weight alone, or with neither.
        std: weights are drawn from N(0, std) and biases are 0; as in `nn.Linear` if None.
    Raises: ValueError if there is no layer.

    Papers differ in little else (of a 2048-wide encoder):
        SimCLR      mlp(2048, 2048, 128, bias=False, last_norm="scale", std=0.01); v2 one layer more
        MoCo v1     mlp(2048, 128)
        MoCo v2     mlp(2048, 2048, 128, norm=False)
        MoCo v3     mlp(2048, 4096, 256, bias=False, last_norm="plain"), predictor mlp(256, 4096, 256, bias=False)
        BYOL        mlp(2048, 4096, 256, last_bias=False), predictor mlp(256, 4096, 256, last_bias=False)
        SimSiam     mlp(2048, 2048, 2048, 2048, bias=False, last_norm="plain"),
                    predictor mlp(2048, 512, 2048, bias=False, last_bias=True)
        SwAV        mlp(2048, 2048, 128)
        Barlow      mlp(2048, 8192, 8192, 8192, bias=False)
        VICReg      mlp(2048, 8192, 8192, 8192, last_bias=False)
    """
    if len(widths) < 2:
        raise ValueError(f"layers: an MLP has at least one, widths are {widths}")
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers.append(nn.Linear(before, after, bias))
        layers += [BatchNorm(after)] if norm else []
        layers.append(nn.ReLU() if activation == "relu" else nn.GELU())
    layers.append(nn.Linear(widths[-2], widths[-1], bias if last_bias is None else last_bias))
    if last_norm != "none":
        layers.append(BatchNorm(widths[-1], {"affine": True, "scale": "scale", "plain": False}[last_norm]))
    for layer in layers:
        if std is not None and isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
