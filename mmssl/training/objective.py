"""The one module that is trained: a method and a linear probe that cannot disturb it, or several on a shared trunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.distributed import all_sum, rank, world
from mmssl.methods.bind import Binding
from mmssl.methods.joint import Joint
from mmssl.methods.method import Method
from mmssl.parts import Magnitude
from mmssl.random import row_keys
from mmssl.types import Batch, Clock, View

# The probe's gradients must not weigh in the norm that DeepSpeed clips by. Adam is blind to the scale of a loss.
PROBE_SCALE = 1e-4
BINDING = "bind"  # before the metrics of what binds several kinds of data, where a member's name stands


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
        ragged: whether micro-batches hold unequal numbers of loss terms, so that each counts by its own; see `Method.terms`.
        scale: what the loss is multiplied by, but not its terms, as they are logged.
        magnitude: if given, the loss is also divided by its running mean.
        finish: what views still lack when they come from the loader, see `Views.finish`.
    """

    accepts_loss_kwargs = False  # the Trainer must divide the loss by the number of micro-batches itself

    def __init__(
        self,
        method: Method,
        classes: int = 0,
        ragged: bool = False,
        scale: float = 1.0,
        magnitude: Magnitude | None = None,
        finish: Callable[[list[View]], list[View]] = lambda views: views,
    ):
        super().__init__()
        self.method, self.ragged, self.scale, self.magnitude, self.finish = method, ragged, scale, magnitude, finish
        dim = method.student.encoder.dim
        self.standardise = Standardise(dim)
        self.probe = nn.Linear(dim, classes) if classes else None
        self.outputs: dict[str, list[Tensor]] = {"": []}  # (B, D) pooled, of the micro-batches of the last update
        self.seen = -1  # that update
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
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses, or without a clock the embeddings of the first view.

        Args:
            tensors: a flat batch, see `Batch.tensors`, perhaps with `label` (B,) int64, -1 = unknown.
            keys: one a row, see `keys`. Dropout is seeded by the first.
            weights: what this micro-batch counts in its update, under the name "".
        Returns: `total`, the scalar to differentiate; `loss`, the method's sum; `loss/<part>`, `health/<metric>`.
            Without a clock: `embedding` (B, D), `local` (B, D), the local features of one token in the middle, with pairs
            `bound` (B, F), and, with a probe, `logits` (B, classes). With `describe`: only `described` (B, F), see
            `Method.describe`.
            With `rebuild`: only the fields of `Rebuilt`, see `Method.rebuild`.
        """
        batch = Batch.from_tensors(tensors, tuple(keys))
        batch = batch._replace(views=self.finish(batch.views))
        if describe:
            return {"described": self.method.describe(batch.views[0]).float()}
        if rebuild:
            found = self.method.rebuild(batch, clock or Clock())
            return {} if found is None else {name: t for name, t in found._asdict().items() if t is not None}
        if clock is None:
            embedding, local = self.method.student.encoder.inspect(batch.views[0])
            out = {"embedding": embedding.float(), "local": local.float()}
            if self.method.pairs:
                out["bound"] = self.method.bound(embedding).float()
            return out if self.probe is None else out | {"logits": self.probe(self.standardise(out["embedding"]))}
        if keys:
            torch.manual_seed(keys[0])
        losses, health, embedding, bound = self.method(batch, clock)
        terms = [term.float() for term in losses.values()] or [torch.zeros((), device=batch.index.device)]
        loss, share = torch.stack(terms).sum(), weights[""] if weights else 1.0
        if self.magnitude is not None:
            self.magnitude.measure(loss * share)
            loss = loss * self.magnitude.factor()
        loss = self.scale * loss
        out = {"total": loss, "loss": loss.detach()}
        out |= {f"loss/{name}": term.detach() for name, term in losses.items()}
        out |= {f"health/{name}": value.detach() for name, value in health.items()}
        self._keep(embedding, clock)
        if self.probe is not None and embedding is not None:
            logits, labels = self.probe(self.standardise(embedding.float())), tensors["label"]
            known = (labels >= 0).sum().clamp(min=1)  # a batch without any label adds zero, not NaN
            out["total"] = loss + PROBE_SCALE * F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / known
        if weights:
            out = {name: value if name.startswith("health/") else value * share for name, value in out.items()}
        return out if bound is None else out | {"bound": bound}

    def _keep(self, embedding: Tensor | None, clock: Clock) -> None:
        rows = self.outputs[""] if self.seen == clock.step else []
        self.outputs, self.seen = {"": rows if embedding is None else [*rows, embedding.detach()]}, clock.step

    @property
    def probes(self) -> list[nn.Linear]:
        """Linear classifiers that learn along."""
        return [] if self.probe is None else [self.probe]

    def keys(self, tensors: dict[str, Tensor], seed: int, step: int, micro: int) -> tuple[int, ...]:
        """What seeds the draws of a micro-batch of this rank, see `random.row_keys`."""
        return row_keys(seed, step, micro, len(tensors["index"]), rank(), world())

    def indices(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """ "" -> (B,) the samples of a flat batch."""
        return {"": tensors["index"]}

    def terms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """ "" -> () how many terms a micro-batch has, if that differs; see `Method.terms`."""
        found = self.method.terms(Batch.from_tensors(tensors)) if self.ragged else None
        return {} if found is None else {"": found}


class JointObjective(nn.Module):
    """The objectives of several kinds of data in a single forward; all ranks go through all of them in the same order.

    The tensors of a flat batch, and all that comes out, are called MEMBER.NAME.

    Args:
        members: built on encoders that share a trunk.
        binding: of those whose rows are pairs.
    """

    accepts_loss_kwargs = False

    def __init__(self, members: Mapping[str, Objective], binding: Binding | None = None):
        super().__init__()
        self.members, self.binding = nn.ModuleDict(dict(members)), binding
        magnitudes = {name: objective.magnitude for name, objective in members.items() if objective.magnitude is not None}
        method = Joint({name: objective.method for name, objective in members.items()}, magnitudes)
        method.add_module("binding", binding)
        object.__setattr__(self, "method", method)  # the same modules under other names: not registered twice
        self.method: Joint
        self.ragged = any(objective.ragged for objective in members.values())

    def forward(
        self,
        tensors: dict[str, Tensor],
        keys: Mapping[str, Sequence[int]] | None = None,
        clock: Clock | None = None,
        rebuild: bool = False,
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """As `Objective.forward`: of all members with a clock, where `loss` is the sum of theirs; of the only one that the
        batch is of otherwise, or with `rebuild`, and then without a name before what comes out.
        """
        own, keys = self.split(tensors), keys or {}
        if clock is None or rebuild:
            ((name, part),) = own.items()
            return self._member(name)(part, keys.get(name, ()), clock, rebuild=rebuild)
        out: dict[str, Tensor] = {}
        sums, bound = {}, {}
        for name in self.members:
            weight = {"": weights[name]} if weights and name in weights else None
            found = self._member(name)(own[name], keys[name], clock, weights=weight)
            for each in ("total", "loss"):
                sums.setdefault(each, []).append(found.pop(each))
            bound |= {name: found.pop("bound")} if "bound" in found else {}
            out |= {inside(each, name): value for each, value in found.items()}
        if self.binding is not None:
            index, content = ({name: own[name][what] for name in bound} for what in ("index", "content"))
            for each, value in self.binding(bound, index, content).items():
                for total in ("total", "loss") if each.startswith("loss/") else ():
                    sums[total].append(value if total == "total" else value.detach())
                out[inside(each, BINDING)] = value.detach()
        return {each: torch.stack(parts).sum() for each, parts in sums.items()} | out

    @property
    def outputs(self) -> dict[str, list[Tensor]]:
        """Member -> (B, D) pooled, of the micro-batches of the last update."""
        return {name: self._member(name).outputs[""] for name in self.members}

    def _member(self, name: str) -> Objective:
        found: Any = self.members[name]
        return found

    def split(self, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Member -> its part of a flat batch."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            member, _, rest = name.partition(".")
            found.setdefault(member, {})[rest] = tensor
        return found

    @property
    def probes(self) -> list[nn.Linear]:
        """Linear classifiers that learn along."""
        return [probe for name in self.members for probe in self._member(name).probes]

    def keys(self, tensors: dict[str, Tensor], seed: int, step: int, micro: int) -> dict[str, tuple[int, ...]]:
        """Those that each member would have if it were alone."""
        return {name: self._member(name).keys(part, seed, step, micro) for name, part in self.split(tensors).items()}

    def indices(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Member -> (B,) its samples."""
        return {name: part["index"] for name, part in self.split(tensors).items()}

    def terms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Member -> () how many terms its micro-batch has, for those where that differs."""
        each = {name: self._member(name).terms(part) for name, part in self.split(tensors).items()}
        return {name: found[""] for name, found in each.items() if found}


def inside(metric: str, member: str) -> str:
    """A metric's name in a run of several kinds of data: `loss/tokens` of vision is `loss/vision.tokens`."""
    kind, _, rest = metric.partition("/")
    return f"{kind}/{member}.{rest}" if member else metric


def called(tensors: dict[str, Tensor], member: str) -> dict[str, Tensor]:
    """A flat batch as the part of a member in a run of several kinds of data."""
    return {f"{member}.{name}": tensor for name, tensor in tensors.items()} if member else tensors
