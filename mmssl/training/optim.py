"""Parameter groups, optimizer, learning rate."""

from __future__ import annotations

import torch
from torch import nn

from mmssl.config import OptimOptions
from mmssl.schedules import Schedule
from mmssl.training.objective import Objective

PROBE_LR = 5e-3


def schedule(options: OptimOptions) -> Schedule:
    """Linear warm-up from 0, perhaps a plateau, then a fall until the end of the run. The first update has rate 0."""
    end = 0.0 if options.fall == "cosine" else options.lr / 100
    return Schedule(options.lr, end, options.fall, warmup=options.warmup, hold=options.hold)


def parameter_groups(objective: Objective, options: OptimOptions) -> list[dict]:
    """Groups with and without weight decay, and the probe's own.

    Only weights of linear, convolutional and embedding layers decay: cls tokens, biases, norms and scales do not, whatever
    their number of dimensions. `decay: all` decays everything, as the published data2vec runs did.
    """
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding
    matrices = {id(module.weight) for module in objective.method.modules() if isinstance(module, kinds)}
    trained = [p for p in objective.method.parameters() if p.requires_grad]
    decayed = [p for p in trained if options.decay == "all" or id(p) in matrices]
    chosen = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay, "role": "method"},
        {"params": [p for p in trained if id(p) not in chosen], "weight_decay": 0.0, "role": "method"},
    ]
    if objective.probe is not None:
        groups.append({"params": list(objective.probe.parameters()), "weight_decay": 0.0, "role": "probe", "eps": 1e-12})
    return [group for group in groups if group["params"]]


def build_optimizer(objective: Objective, options: OptimOptions) -> torch.optim.AdamW:
    """AdamW over the groups; the learning rate is written into them before each update."""
    return torch.optim.AdamW(parameter_groups(objective, options), options.lr, options.betas, options.eps, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Write this update's learning rate into the groups; the probe keeps its own."""
    for group in optimizer.param_groups:
        group["lr"] = rate if group.get("role") != "probe" else PROBE_LR
