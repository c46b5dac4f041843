"""Low-rank updates of linear layers whose own weights stay as they are (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

DOWN, UP, SCALE = "lora_a.weight", "lora_b.weight", "lora_scale"  # beside a layer's `weight`


class LowRank(nn.Linear):
    """W x + alpha/rank * B A dropout(x), of which A and B learn. B is zero at first, so that nothing changes.

    The layer's own parameters keep their names, and all are read in the forward of the module that owns them, as sharded ones
    must be.

    Args:
        linear: whose weights it has.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Linear(self.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, self.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)
        self.dropout = nn.Dropout(dropout)
        self.lora_scale: Tensor
        self.register_buffer(SCALE, torch.tensor(alpha / rank))

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return super().forward(input) + self.lora_scale * self.lora_b(self.lora_a(self.dropout(input)))


def add_low_rank(encoder: nn.Module, rank: int, alpha: float, dropout: float, modules: Sequence[str]) -> None:
    """Freeze an encoder, and give those linear layers an update each.

    Args:
        modules: ends of their names, such as `attn.qkv`; all of them if there are none.
    Raises: ValueError that begins with the option if an end is that of no layer.
    """
    linear = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    for end in modules or [""]:
        if not any(chosen(name, [end] if end else []) for name in linear):
            known = dict.fromkeys(".".join(name.split(".")[-2:]) for name in linear)
            raise ValueError(
                f"lora.modules: no linear layer of the encoder is called {end!r}; there are {', '.join(known)}"
                if known
                else "lora: the encoder has no linear layer; leave it out"
            )
    encoder.requires_grad_(False)
    for name, module in linear.items():
        if chosen(name, modules):
            encoder.set_submodule(name, LowRank(module, rank, alpha, dropout))


def chosen(name: str, modules: Sequence[str]) -> bool:
    """Whether a layer is one of those that these ends of names mean; without any, all are."""
    return not modules or any(name == end or name.endswith(f".{end}") for end in modules)


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with each update added to the weight that it belongs to; nothing changes where there are none."""
    stems = [name.removesuffix(UP) for name in tensors if name.endswith(f".{UP}")]
    if not stems:
        return tensors
    own = tuple(f"{stem}{part}" for stem in stems for part in (DOWN, UP, SCALE))
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith(own)}
    for stem in stems:
        down, up, scale, weight = (tensors[f"{stem}{part}"] for part in (DOWN, UP, SCALE, "weight"))
        found[f"{stem}weight"] = weight + scale * (up @ down)
    return found


def untouched(encoder: nn.Module) -> dict[str, Tensor]:
    """What the updates of an encoder begin with: A as it was drawn, B zero, whatever a method drew anew since."""
    state = encoder.state_dict()
    own = {name: tensor for name, tensor in state.items() if name.endswith((DOWN, UP, SCALE))}
    return {name: torch.zeros_like(tensor) if name.endswith(UP) else tensor for name, tensor in own.items()}
