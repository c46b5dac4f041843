"""Parameter groups, optimizer, and what changes in them from update to update."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.config import OptimOptions, nearest
from mmssl.errors import RecipeError
from mmssl.lars import Lars
from mmssl.methods.method import Method
from mmssl.parts import Part
from mmssl.schedules import Schedule, constant, cosine
from mmssl.training.objective import PROBE_SCALE, JointObjective, Objective
from mmssl.types import Clock

PROBE_LR = 5e-3
ENCODER = re.compile(r"(members\.\w+\.)?student\.encoder\.")  # names of its parameters


def schedule(options: OptimOptions, batch: int | None = None, epochs: float | None = None) -> Schedule:
    """Linear warm-up, perhaps a plateau, then a fall until the end of the run.

    Args:
        batch: N, samples of an update over all ranks; read where the rate is scaled by it.
        epochs: passes over the data in the run; read where the rate changes by the epoch.
    Raises: RecipeError if the end lies above the peak; ValueError if what is read is missing.
    """
    peak = options.lr
    if options.scale != "none":
        if batch is None:
            raise ValueError(f"optim.scale: {options.scale} needs the global batch; pass it to `schedule`")
        peak *= batch / 256 if options.scale == "linear" else math.sqrt(batch / 256)
    ends = {"cosine": 0.0, "linear": 0.0, "exponential": peak / 100, "steps": peak / 10 ** len(options.fall_at), "none": peak}
    end = ends[options.fall] if options.lr_end is None else options.lr_end
    if end > peak:
        raise RecipeError(f"optim.lr_end: {end} lies above the peak of {peak:.6g}; lower it (it is not scaled by the batch).")
    return Schedule(
        peak,
        end,
        "linear" if options.fall == "none" else options.fall,
        math.ceil(epochs) if options.by == "epoch" and epochs is not None else None,
        options.warmup,
        options.hold,
        options.warmup_from or 0.0,
        options.warmup_from is not None,
        options.by,
        tuple(options.fall_at),
    )


def parameter_groups(
    objective: Objective | JointObjective, options: OptimOptions, rate: Schedule | None = None
) -> list[dict[str, Any]]:
    """Groups of the method's parameters by what decays, has a rate of its own or may stand still, and the probe's group.

    By `decay: matrices` only weights of linear, convolutional and embedding layers and prototypes decay: cls tokens, biases,
    norms and scales do not, whatever their number of dimensions. LARS adapts what decays, and no parameter without dimensions.

    Args:
        rate: of the method, see `schedule`; made of the options if unset.
    Raises: RecipeError if `exclude` or `steady` names nothing that is trained.
    """
    method, rate = objective.method, rate or schedule(options)
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding
    matrices = {id(module.weight) for module in method.modules() if isinstance(module, kinds)}
    matrices |= {id(getattr(part, name)) for part in method.modules() if isinstance(part, Part) for name in part.matrices}
    adaptive = options.name in ("lars", "larc")
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    for key, wanted in (("exclude", options.exclude), ("steady", options.steady)):
        for part in wanted:
            if not any(_below(name, [part]) for name in trained):
                known = dict.fromkeys(".".join(name.split(".")[:n]) for name in trained for n in (1, 2, 3))
                raise RecipeError(f"optim.{key}: nothing that is trained is called {part!r}{nearest(part, known)}.")

    def decays(name: str, p: Tensor) -> bool:
        if _below(name, [*options.exclude, *undecayed]) or (adaptive and p.ndim == 0):
            return False
        above = p.ndim > 1 and name.split(".")[-1] != "bias"
        return {"matrices": id(p) in matrices, "above_1d": above, "all": True}[options.decay]

    undecayed = [name for name, part in method.named_modules() if isinstance(part, Part) and not part.decays]
    freezing = [name for name, module in method.named_modules() if hasattr(module, "is_frozen")]
    members: dict[tuple[bool, bool, bool, str | None, float, int], list[Tensor]] = {}
    for name, p in trained.items():
        own_rate = options.bias_lr is not None and p.ndim <= 1
        module = next((part for part in freezing if _below(name, [part])), None)
        share = layer_share(name, options.layer_decay, method)
        still = options.heads_first if ENCODER.match(name) else 0
        members.setdefault((decays(name, p), own_rate, _below(name, options.steady), module, share, still), []).append(p)
    groups = []
    for (decayed, own_rate, steady, module, share, still), params in sorted(members.items(), key=lambda item: not item[0][0]):
        factor = share * (options.bias_lr / options.lr if own_rate and options.bias_lr else 1.0)
        decay = _decay(options) if decayed else constant(0.0)
        group = {"params": params, "role": "method", "adapt": decayed, "weight_decay": decay.start, "decay": decay}
        group |= {"factor": factor, "own_rate": factor * rate.start if steady else None, "module": module, "still": still}
        groups.append(group)
    if objective.probes:
        groups.append(_probe_group(objective.probes, options))
    return groups


def layer_share(name: str, decay: float, method: Method) -> float:
    """Share of the rate of a parameter: decay for the last block of the student's trunk, its square for the one before, and so
    on; 1 for all that is in no block, as in data2vec's fine-tuning.
    """
    found = re.match(r"((?:members\.\w+\.)?student\.encoder\.transformer\.blocks)\.(\d+)\.", name)
    if decay == 1 or found is None:
        return 1.0
    return decay ** (len(method.get_submodule(found[1])) - int(found[2]))  # type: ignore[arg-type]


def _below(name: str, parts: Sequence[str]) -> bool:
    """Whether a parameter belongs to one of those parts of the method."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _decay(options: OptimOptions) -> Schedule:
    if options.weight_decay_end is None:
        return constant(options.weight_decay)
    return cosine(options.weight_decay, options.weight_decay_end)


def _probe_group(probes: Sequence[nn.Linear], options: OptimOptions) -> dict[str, Any]:
    """With a rate of its own, without decay or adaptation.

    For SGD and its relatives the rate undoes the scale of the loss, to which Adam is blind; over D it keeps softmax regression
    on D standardised features stable however they correlate (curvature at most D / 2).
    """
    rate = PROBE_LR if options.name == "adamw" else 1 / (PROBE_SCALE * probes[0].in_features)
    group = {
        "params": [p for probe in probes for p in probe.parameters()],
        "role": "probe",
        "adapt": False,
        "weight_decay": 0.0,
        "eps": 1e-12,
    }
    return group | {"decay": constant(0.0), "factor": 1.0, "own_rate": rate, "module": None, "still": 0}


def build_optimizer(
    objective: Objective | JointObjective, options: OptimOptions, rate: Schedule | None = None
) -> torch.optim.Optimizer:
    """The optimizer over the groups; rates and decay are written into them before each update, see `set_rates`."""
    groups = parameter_groups(objective, options, rate)
    if options.name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, options.lr, options.betas, options.eps, fused=True)
    elif options.name == "sgd":
        optimizer = torch.optim.SGD(groups, options.lr, options.momentum, nesterov=options.nesterov, foreach=True)
    else:
        clipped = "larc_clip" if options.trust_clip else "larc"
        variant = options.variant if options.name == "lars" else clipped
        optimizer = Lars(groups, options.lr, options.momentum, trust=options.trust, variant=variant)
    optimizer.register_step_post_hook(_forget_frozen)
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, rate: float, clock: Clock | None = None, method: Method | None = None) -> None:
    """Write this update's learning rates and weight decays into the groups; before the update, as DeepSpeed steps in backward.

    A module of the method with `is_frozen(clock) -> bool` gets zero for both while it is frozen, and stays as it is to the bit;
    so does the encoder for its first `heads_first` updates.

    Args:
        rate: of the method; the probe and what is steady keep their own.
        clock: where the run stands; may be left out where weight decay is constant and nothing freezes.
        method: the same goes for the method.
    """
    for group in optimizer.param_groups:
        group["frozen"] = False
        if group["module"] is not None:
            assert clock is not None, "a module that freezes needs the clock"
            assert method is not None, "a module that freezes needs the method"
            module: Any = method.get_submodule(group["module"])
            group["frozen"] = module.is_frozen(clock)
        if group["still"]:
            assert clock is not None, "an encoder that waits for its heads needs the clock"
            group["frozen"] |= clock.step < group["still"]
        own, decay = group["own_rate"], group["decay"]
        if decay.start != decay.end:
            assert clock is not None, "a weight decay that changes needs the clock"
        group["lr"] = 0.0 if group["frozen"] else own if own is not None else rate * group["factor"]
        group["weight_decay"] = 0.0 if group["frozen"] else decay(clock or Clock())


def _forget_frozen(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A module that thaws finds momentum and AdamW's count of steps at zero, as when its gradients had been dropped.

    With the count alone run on, bias correction would be over, and the first steps after a frozen epoch up to 6.6 times too
    long at betas of 0.9 and 0.999.
    """
    for group in optimizer.param_groups:
        if group.get("frozen"):
            for p in group["params"]:
                for value in optimizer.state.get(p, {}).values():
                    value.zero_()


@torch.no_grad()
def clip_each(parameters: Iterable[Tensor], limit: float) -> None:
    """Shorten each gradient by itself to a norm of `limit`, as DINO does."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients))
        torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1).unbind()))


def check_whole(options: OptimOptions) -> None:
    """Refuse under DeepSpeed what its flattened shards break. Raises: RecipeError."""
    mend = "train with DDP (accelerate launch --multi_gpu)"
    if options.name in ("lars", "larc"):
        raise RecipeError(
            f"optim.name: {options.name} takes the norm of each whole tensor, and DeepSpeed flattens and shards them; "
            f"{mend}, or set optim.name=adamw."
        )
    if options.clip_each:
        raise RecipeError(
            "optim.clip_each: takes the norm of each whole gradient, and DeepSpeed flattens and shards them; "
            f"{mend}, or use optim.clip."
        )
