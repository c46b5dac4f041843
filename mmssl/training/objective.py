"""The one module that is trained: a method, and a linear probe that cannot disturb it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.distributed import all_sum
from mmssl.methods.method import Method
from mmssl.types import Batch, Clock

# The probe's gradients must not weigh in the norm that DeepSpeed clips by. Adam is blind to the scale of a loss.
PROBE_SCALE = 1e-4


class Standardise(nn.Module):
    """Each dimension to mean 0 and variance 1: by the samples of all ranks in training, by `calibrate`'s otherwise.

    Its input is detached, so the statistics need no gradient. Running averages would be those of masked views; the probe is
    used on whole ones.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        mean, variance = self.mean, self.variance
        if self.training:
            count, first, second = all_sum(torch.stack([torch.ones_like(x), x, x.square()]).sum(1)).unbind(0)
            mean, variance = first / count, (second / count - (first / count).square()).clamp(min=0)
        return (x - mean) * (variance + self.eps).rsqrt()

    def calibrate(self, features: Tensor) -> None:
        """Use the statistics of these features, (N, D), from now on."""
        self.mean.copy_(features.mean(0))
        self.variance.copy_(features.var(0, correction=0))


class Objective(nn.Module):
    """All views, teacher and losses of a micro-batch in a single forward, as DDP and ZeRO want it.

    Args:
        method: what is learned.
        classes: if above 0, a linear classifier learns from detached embeddings; it has no influence on the encoder.
    """

    accepts_loss_kwargs = False  # the Trainer must divide the loss by the number of micro-batches itself

    def __init__(self, method: Method, classes: int = 0):
        super().__init__()
        self.method = method
        dim = method.student.encoder.dim
        self.standardise = Standardise(dim)
        self.probe = nn.Linear(dim, classes) if classes else None
        if self.probe is not None:  # from zero, so that its start needs no random draw
            nn.init.zeros_(self.probe.weight)
            nn.init.zeros_(self.probe.bias)

    def forward(
        self,
        tensors: dict[str, Tensor],
        keys: Sequence[int] = (),
        clock: Clock | None = None,
        describe: bool = False,
        rebuild: bool = False,
    ) -> dict[str, Tensor]:
        """Losses, or without a clock the embeddings of the first view.

        Args:
            tensors: a flat batch, see `Batch.tensors`, perhaps with `label` (B,) int64, -1 = unknown.
            keys: one a row, see `random.row_keys`. Dropout is seeded by the first.
        Returns: `total`, the scalar to differentiate; `loss`, the method's sum; `loss/<part>`, `health/<metric>`.
            Without a clock: `embedding` (B, D), `local` (B, D), the local features of one token in the middle, and, with a
            probe, `logits` (B, classes). With `describe`: only `described` (B, F), see `Method.describe`.
            With `rebuild`: only the fields of `Rebuilt`, see `Method.rebuild`.
        """
        batch = Batch.from_tensors(tensors, tuple(keys))
        if describe:
            return {"described": self.method.describe(batch.views[0]).float()}
        if rebuild:
            found = self.method.rebuild(batch, clock or Clock())
            return {} if found is None else {name: t for name, t in found._asdict().items() if t is not None}
        if clock is None:
            embedding, local = self.method.student.encoder.inspect(batch.views[0])
            out = {"embedding": embedding.float(), "local": local.float()}
            return out if self.probe is None else out | {"logits": self.probe(self.standardise(out["embedding"]))}
        if keys:
            torch.manual_seed(keys[0])
        losses, health, embedding = self.method(batch, clock)
        loss = torch.stack([term.float() for term in losses.values()]).sum()
        out = {"total": loss, "loss": loss.detach()}
        out |= {f"loss/{name}": term.detach() for name, term in losses.items()}
        out |= {f"health/{name}": value.detach() for name, value in health.items()}
        if self.probe is not None and embedding is not None:
            logits, labels = self.probe(self.standardise(embedding.float())), tensors["label"]
            known = (labels >= 0).sum().clamp(min=1)  # a batch without any label adds zero, not NaN
            out["total"] = loss + PROBE_SCALE * F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / known
        return out
