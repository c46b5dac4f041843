"""What a teacher copies."""

from __future__ import annotations

from torch import nn

from mmssl.model.encoder import Encoder


class Network(nn.Module):
    """Names modules: an encoder and, for joint-embedding methods, its heads. The teacher has the same names."""

    encoder: Encoder

    def __init__(self, encoder: Encoder, **heads: nn.Module):
        super().__init__()
        self.encoder = encoder
        for name, head in heads.items():
            self.add_module(name, head)
