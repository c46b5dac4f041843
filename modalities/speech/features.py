"""Sound to frame features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.model.encoder import features_of
from mmssl.model.positions import Alibi, ConvPositions

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


@features_of("speech")
class SpeechFeatures(nn.Module):
    """Seven convolutions over the wave at 16 kHz, one frame each 20 ms. (B, samples) -> (B, L, D).

    Layer norm over channels and GELU after each convolution, then layer norm and projection (arXiv:2006.11477, appendix B,
    the variant with layer norm; arXiv:2202.03555, section 4).
    """

    input_name = "input_values"
    sample_rate, stride, receptive_field = 16_000, 320, 400
    normed, mask_id = False, None

    def __init__(
        self,
        dim: int,
        conv_channels: int = 512,
        position_layers: int = 5,
        position_kernel: int = 19,
        position_groups: int = 16,
        alibi: bool = True,
    ):
        super().__init__()
        if not 1 <= conv_channels <= 1 << 14:
            raise ValueError(f"conv_channels: {conv_channels}, must be between 1 and {1 << 14}")
        for name, value in {"position_layers": position_layers, "position_kernel": position_kernel}.items():
            if not 1 <= value <= 1 << 10:
                raise ValueError(f"{name}: {value}, must be between 1 and {1 << 10}")
        if position_groups < 1 or dim % position_groups:
            raise ValueError(f"position_groups: {position_groups} groups must divide hidden_size {dim}")
        self.dim, self.alibi = dim, alibi
        self.position_layers, self.position_kernel, self.position_groups = position_layers, position_kernel, position_groups
        self.grid = (self.frames(20 * self.sample_rate),)
        self.length = self.grid[0]
        widths = [1] + [conv_channels] * len(KERNELS)
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, kernel, stride, bias=False) for a, b, kernel, stride in zip(widths, widths[1:], KERNELS, STRIDES)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(conv_channels) for _ in KERNELS)
        self.norm, self.proj = nn.LayerNorm(conv_channels), nn.Linear(conv_channels, dim)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]

    @staticmethod
    def frames(samples: int) -> int:
        """Frames of a wave; 0 if it is shorter than the receptive field of 400 samples."""
        for kernel, stride in zip(KERNELS, STRIDES):
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

    def pad(self, attention_mask: Tensor) -> Tensor:
        """(B, samples) as transformers has it, 1 = valid -> (B, L) bool, True = frame that padding reaches into."""
        valid = attention_mask.sum(1)
        for kernel, stride in zip(KERNELS, STRIDES):
            valid = (valid - kernel).div(stride, rounding_mode="floor") + 1
        places = valid.new_tensor(range(self.frames(attention_mask.shape[1])))
        return places >= valid[:, None]

    def positions(self, heads: int, extra: int) -> nn.Module:
        """Convolutional positions, with biases that grow with distance if `alibi`."""
        bias = Alibi(heads, extra) if self.alibi else None
        return ConvPositions(self.dim, self.position_layers, self.position_kernel, self.position_groups, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Listen and project. Frames that lie within a row's valid samples do not depend on what follows."""
        if self.frames(x.shape[1]) < 1:
            raise ValueError(f"{x.shape[1]} samples are too few for a frame; at least {self.receptive_field} are needed")
        x = x[:, None]
        for conv, norm in zip(self.convs, self.norms):
            x = F.gelu(norm(conv(x).transpose(1, 2))).transpose(1, 2)
        return self.proj(self.norm(x.transpose(1, 2)))
