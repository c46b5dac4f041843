"""Everything a run needs to go on, as named fp32 tensors that do not depend on how it was sharded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from mmssl.distributed import full_value, is_partitioned, rank, set_full_value, share_slices
from mmssl.errors import CheckpointError
from mmssl.training.objective import JointObjective, Objective


@torch.no_grad()
def model_state(objective: Objective | JointObjective) -> dict[str, Tensor]:
    """Name -> whole fp32 tensor on the CPU, teacher included; where that is the trained tensor itself, before the next update.
    A collective under ZeRO-3.
    """
    state = _each_once(objective.state_dict(keep_vars=True))
    for name, parameter in objective.named_parameters():
        if is_partitioned(parameter):
            state[name] = full_value(parameter)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _each_once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """By its first name, what several encoders share."""
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}


def load_model_state(objective: Objective | JointObjective, saved: dict[str, Tensor], added: Collection[str] = ()) -> None:
    """In place, before the module is wrapped or partitioned. Raises: CheckpointError naming what does not fit.

    Args:
        added: members that the checkpoint does not know, and that stay as they are.
    """
    own = _each_once(objective.state_dict(keep_vars=True))
    own = {n: t for n, t in own.items() if n in saved or not n.startswith(tuple(f"members.{name}." for name in added))}
    wrong = [n for n in own if n not in saved] + [n for n in saved if n not in own]
    wrong += [n for n in own if n in saved and own[n].shape != saved[n].shape]
    if wrong:
        raise CheckpointError(f"The checkpoint does not fit this recipe's model: {', '.join(sorted(set(wrong))[:5])}.")
    objective.load_state_dict(saved, strict=False)  # of what has several names, one is enough


def restore_model_state(objective: Objective | JointObjective, saved: dict[str, Tensor], added: Collection[str] = ()) -> None:
    """The same while it trains, wrapped or partitioned as it is."""
    split = {name: parameter for name, parameter in objective.named_parameters() if is_partitioned(parameter)}
    if split:
        objective.load_state_dict({name: tensor for name, tensor in saved.items() if name not in split}, strict=False)
    else:
        load_model_state(objective, saved, added)
    for name, parameter in split.items():
        if name in saved:
            set_full_value(parameter, saved[name])
    for parameter in objective.parameters():
        master = getattr(parameter, "_hp_mapping", None)  # this rank's slice of it, under ZeRO-1 and ZeRO-2
        if master is not None:
            master.update_hp()


@torch.no_grad()
def optimizer_state(objective: Objective | JointObjective, optimizer: Any) -> dict[str, Tensor]:
    """`name.exp_avg`, `name.step` and so on of every trained parameter, whole, as `model_state`. A collective under ZeRO."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps
    zero, state = _is_zero(inner), {}
    shards = _shards(inner) if zero else {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        if zero:
            shard = shards[parameter]
            own = {key: v if key == "step" else _zero_moment(parameter, key) for key, v in shard.items()}
        else:
            own = inner.state.get(parameter, {})
        state |= {f"{name}.{key}": value for key, value in own.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


@torch.no_grad()
def load_optimizer_state(objective: Objective | JointObjective, optimizer: Any, saved: dict[str, Tensor]) -> None:
    """After the engine was built; what it holds is replaced."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    zero = _is_zero(inner)
    shards = _shards(inner) if zero else {}
    if zero:  # in place, since parameters have views of them
        for tensor in {id(tensor): tensor for shard in shards.values() for tensor in shard.values()}.values():
            tensor.zero_()
    else:
        inner.state.clear()
    for name, parameter in objective.named_parameters():
        own = {key.rpartition(".")[2]: value for key, value in saved.items() if key.rpartition(".")[0] == name}
        if not parameter.requires_grad or not own:
            continue
        if not zero:
            inner.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in own.items()}
            continue
        for key, value in own.items():
            if key == "step":
                shards[parameter]["step"].copy_(value)
            else:
                _set_zero_moment(parameter, key, value)


def _is_zero(inner: Any) -> bool:
    """Whether it is one of ZeRO's, around the one that makes the updates."""
    return hasattr(inner, "optimizer") and not isinstance(inner, torch.optim.Optimizer)


def _shards(inner: Any) -> dict[Tensor, dict[str, Tensor]]:
    """Parameter -> what the optimizer keeps of the shard in which the parameter lies, together with others.

    A shard that has had no update yet, which has nothing to read or to write into, is given zeros: that comes to the same.
    """
    optimizer: torch.optim.Optimizer = inner.optimizer
    kept = ("exp_avg", "exp_avg_sq")
    if isinstance(optimizer, torch.optim.SGD):
        kept = ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
    third = hasattr(inner, "fp32_partitioned_groups_flat")
    flats = inner.fp32_partitioned_groups_flat if third else inner.single_partition_of_fp32_groups
    shards = {}
    for parameters, flat in zip(inner.fp16_groups if third else inner.bit16_groups, flats):
        state = optimizer.state[flat]
        if kept and not state:
            state |= {moment: torch.zeros_like(flat) for moment in kept}
            if "exp_avg" in kept:
                state["step"] = torch.zeros((), device=flat.device if optimizer.defaults.get("fused") else "cpu")
        shards |= dict.fromkeys(parameters, state)
    if not third:  # parameters get views of their moments after the first group's first update, when other groups have none
        inner._hp_optimizer_states_linked = False
        inner._lazy_init_hp_params_optimizer_state()
    return shards


def _zero_moment(parameter: Any, moment: str) -> Any:
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    if not is_partitioned(parameter):
        return safe_get_full_optimizer_state(parameter, moment)
    local = safe_get_local_optimizer_state(parameter, moment)
    whole = torch.zeros(parameter.ds_shape, dtype=torch.float32, device=local.device)
    start = rank() * parameter.ds_tensor.ds_numel
    part = whole.view(-1)[start : start + local.numel()]
    part.copy_(local.flatten()[: part.numel()])
    share_slices([whole], [True])
    return whole


def _set_zero_moment(parameter: Any, moment: str, value: Tensor) -> None:
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not is_partitioned(parameter):
        safe_set_full_optimizer_state(parameter, value, moment)
        return
    local = torch.zeros_like(safe_get_local_optimizer_state(parameter, moment)).flatten()
    start = rank() * parameter.ds_tensor.ds_numel
    part = value.flatten()[start : start + local.numel()]
    local[: part.numel()] = part
    safe_set_local_optimizer_state(parameter, local, moment)
