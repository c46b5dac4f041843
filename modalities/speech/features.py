"""Sound to frame features."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.model.encoder import features_of
from mmssl.model.positions import Alibi, ConvPositions, NoPositions, SingleConvPositions

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


@features_of("speech")
class SpeechFeatures(nn.Module):
    """Seven convolutions over the wave at 16 kHz, one frame each 20 ms. (B, samples) -> (B, L, D).

    A norm and GELU after each convolution, then layer norm and projection (arXiv:2006.11477, sections 2 and 4.2;
    arXiv:2202.03555, section 4).

    Args:
        conv_channels: C, width of each convolution.
        conv_norm: layer, over channels after each convolution (data2vec; wav2vec 2.0 and HuBERT large); group, each channel
            over time, after the first convolution only (wav2vec 2.0 and HuBERT base). Group norm sees the whole row, padding
            too: features then depend on how far a sample is padded, so batches must be cut to equal lengths.
        conv_bias: whether convolutions have biases (wav2vec 2.0 and HuBERT large).
        positions: stack, the convolutions of data2vec; single, the wide one of wav2vec 2.0 and HuBERT, whose position_kernel
            is 128; none, with `alibi=false`.
        position_layers: of a stack.
        alibi: whether attention falls with distance (data2vec 2.0).
    """

    input_name = "input_values"
    sample_rate, stride, receptive_field = 16_000, 320, 400
    normed, mask_id = False, None
    units_width = 39  # of `units_input`

    def __init__(
        self,
        dim: int,
        conv_channels: int = 512,
        conv_norm: Literal["layer", "group"] = "layer",
        conv_bias: bool = False,
        positions: Literal["stack", "single", "none"] = "stack",
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
        if positions == "none" and alibi:
            raise ValueError("alibi: true, attention would know distances where positions=none; set model.alibi=false")
        self.dim, self.conv_norm, self.kind, self.alibi = dim, conv_norm, positions, alibi
        self.position_layers, self.position_kernel, self.position_groups = position_layers, position_kernel, position_groups
        self.grid = (self.frames(20 * self.sample_rate),)
        self.length = self.grid[0]
        widths = [1] + [conv_channels] * len(KERNELS)
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, kernel, stride, bias=conv_bias)
            for a, b, kernel, stride in zip(widths, widths[1:], KERNELS, STRIDES)
        )
        norms: list[nn.Module] = [nn.LayerNorm(conv_channels) for _ in KERNELS]
        if conv_norm == "group":
            norms = [nn.GroupNorm(conv_channels, conv_channels), *(nn.Identity() for _ in KERNELS[1:])]
        self.norms = nn.ModuleList(norms)
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
        return torch.arange(self.frames(attention_mask.shape[1]), device=valid.device) >= valid[:, None]

    def positions(self, heads: int, extra: int) -> nn.Module:
        """Convolutional positions, with biases that grow with distance if `alibi`; or none."""
        if self.kind == "none":
            return NoPositions()
        bias = Alibi(heads, extra) if self.alibi else None
        if self.kind == "single":
            return SingleConvPositions(self.dim, self.position_kernel, self.position_groups, bias)
        return ConvPositions(self.dim, self.position_layers, self.position_kernel, self.position_groups, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Listen and project. Without group norm, frames within a row's valid samples do not depend on what follows."""
        return self.proj(self.norm(self.listen(x)))

    def listen(self, x: Tensor) -> Tensor:
        """What the convolutions give, before norm and projection. (B, samples) -> (B, L, C)."""
        if self.frames(x.shape[1]) < 1:
            raise ValueError(f"{x.shape[1]} samples are too few for a frame; at least {self.receptive_field} are needed")
        x = x[:, None]
        for conv, norm in zip(self.convs, self.norms):
            x = conv(x)
            x = F.gelu(norm(x)) if self.conv_norm == "group" else F.gelu(norm(x.transpose(1, 2))).transpose(1, 2)
        return x.transpose(1, 2)

    @staticmethod
    @torch.no_grad()
    def units_input(x: Tensor) -> Tensor:
        """What HuBERT's first units are clusters of: MFCCs and their first and second differences. (B, samples) -> (B, L, 39).

        Every second of them, those of the very samples that a frame hears (arXiv:2106.07447, section III).
        """
        with torch.autocast(x.device.type, enabled=False):
            now = mfcc(x if x.dtype == torch.float64 else x.float())
            change = differences(now)
            return torch.cat((now, change, differences(change)), -1)[:, ::2]


def mfcc(x: Tensor) -> Tensor:
    """Mel-frequency cepstral coefficients of windows of 25 ms every 10 ms, as Kaldi's without dither and energy.

    Args:
        x: (B, samples) at 16 kHz, fp32 or higher, at least 400 samples.
    Returns: (B, T, 13), T = floor((samples - 400) / 160) + 1.
    """
    bands, kept, window, points = 23, 13, 400, 512
    own = {"device": x.device, "dtype": x.dtype}
    frames = x.unfold(1, window, 160)  # (B, T, 400)
    frames = frames - frames.mean(-1, keepdim=True)
    frames = frames - 0.97 * torch.cat((frames[..., :1], frames[..., :-1]), -1)
    power = torch.fft.rfft(frames * torch.hann_window(window, periodic=False, **own) ** 0.85, points).abs().square()
    mel = 1127 * (1 + torch.arange(points // 2 + 1, **own) * (16_000 / points) / 700).log()  # (257,)
    lowest, highest = (1127 * math.log(1 + hertz / 700) for hertz in (20, 8000))
    step = (highest - lowest) / (bands + 1)
    peak = lowest + step * torch.arange(1, bands + 1, **own)
    triangles = (1 - (mel[:, None] - peak).abs() / step).clamp(min=0)  # (257, 23)
    logs = (power @ triangles).clamp(min=torch.finfo(torch.float32).eps).log()
    order = torch.arange(kept, **own)
    waves = (math.pi / bands * (torch.arange(bands, **own)[:, None] + 0.5) * order).cos() * math.sqrt(2 / bands)
    waves[:, 0] = math.sqrt(1 / bands)
    return logs @ (waves * (1 + 11 * (math.pi * order / 22).sin()))  # higher ones are as loud as lower ones then


def differences(x: Tensor) -> Tensor:
    """Slopes over five frames, the first and last repeated beyond the ends. (B, T, n) -> (B, T, n)."""
    near = F.pad(x.mT, (2, 2), mode="replicate").mT  # (B, T + 4, n)
    return (2 * (near[:, 4:] - near[:, :-4]) + near[:, 3:-1] - near[:, 1:-3]) / 10
