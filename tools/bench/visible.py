"""What an encoder costs that sees a quarter of the tokens: MAE's at ratio 0.75 against the same one on whole images."""

from __future__ import annotations

from typing import Any

import torch

from mmssl.config import Recipe
from mmssl.masks import uniform
from mmssl.random import generator
from mmssl.types import Mask, View
from tools.bench.turns import by_turns


@torch.no_grad()
def run(recipe: str = "vision/mae-base", ratio: str = "0.75", batch: str = "4", pairs: str = "5") -> dict[str, Any]:
    """Forward passes of the encoder, by turns, on the CPU in fp32.

    Returns: `time_ratio` (visible tokens : all tokens, median over pairs), its spread, and the largest difference of what
        tokens are with nothing hidden, by both ways through the code.
    """
    setting = Recipe.load(recipe)
    method: Any = setting.build()
    encoder = method.student.encoder.eval()
    features, draw = encoder.features, generator("bench")
    size = features.image_size
    view = View(torch.randn(int(batch), features.channels, size, size, generator=draw), "vision")
    mask = Mask.of(uniform(features.length, int(batch), float(ratio), draw))
    same = encoder(view, Mask.replacing(torch.zeros_like(mask.hidden))).tokens - encoder(view).tokens
    turns = by_turns({"visible": lambda: encoder(view, mask), "all": lambda: encoder(view)}, int(pairs))
    return {
        "name": f"visible tokens : all tokens, ratio {ratio}, encoder of {recipe}, batch {batch}",
        **turns.figures(),
        "difference": float(same.abs().max()),
        "peer": "the same encoder on whole images",
        "peer_version": torch.__version__,
    }
