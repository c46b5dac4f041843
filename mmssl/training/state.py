"""Everything a run needs to go on, as named fp32 tensors that do not depend on how it was sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmssl.distributed import full_value, is_partitioned, rank, set_full_value, share_slices
from mmssl.errors import CheckpointError
from mmssl.training.objective import Objective

MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def model_state(objective: Objective) -> dict[str, Tensor]:
    """Name -> whole fp32 tensor on the CPU, teacher included; where that is the trained tensor itself, before the next update.
    A collective under ZeRO-3.
    """
    state = dict(objective.state_dict())
    for name, parameter in objective.named_parameters():
        if is_partitioned(parameter):
            state[name] = full_value(parameter)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def load_model_state(objective: Objective, saved: dict[str, Tensor]) -> None:
    """In place, before the module is wrapped or partitioned. Raises: CheckpointError naming what does not fit."""
    own = objective.state_dict()
    wrong = [n for n in own if n not in saved] + [n for n in saved if n not in own]
    wrong += [n for n in own if n in saved and own[n].shape != saved[n].shape]
    if wrong:
        raise CheckpointError(f"The checkpoint does not fit this recipe's model: {', '.join(sorted(set(wrong))[:5])}.")
    objective.load_state_dict(saved)


def restore_model_state(objective: Objective, saved: dict[str, Tensor]) -> None:
    """The same while it trains, wrapped or partitioned as it is."""
    split = {name: parameter for name, parameter in objective.named_parameters() if is_partitioned(parameter)}
    if not split:
        return load_model_state(objective, saved)
    objective.load_state_dict({name: tensor for name, tensor in saved.items() if name not in split}, strict=False)
    for name, parameter in split.items():
        set_full_value(parameter, saved[name])


@torch.no_grad()
def optimizer_state(objective: Objective, optimizer: Any) -> dict[str, Tensor]:
    """`name.exp_avg`, `name.step` and so on of every trained parameter, whole, as `model_state`. A collective under ZeRO."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps
    state: dict[str, Tensor] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(inner, "optimizer") and not isinstance(inner, torch.optim.Optimizer):  # a ZeRO optimizer around AdamW
            for moment in MOMENTS:
                state[f"{name}.{moment}"] = _zero_moment(parameter, moment)
            state[f"{name}.step"] = _zero_step(inner)
        else:
            for moment, value in inner.state.get(parameter, {}).items():
                state[f"{name}.{moment}"] = value
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


@torch.no_grad()
def load_optimizer_state(objective: Objective, optimizer: Any, saved: dict[str, Tensor]) -> None:
    """After the engine was built; what it holds is replaced."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    zero = hasattr(inner, "optimizer") and not isinstance(inner, torch.optim.Optimizer)
    if zero:
        _create_zero_moments(inner)
    else:
        inner.state.clear()
    for name, parameter in objective.named_parameters():
        own = {key.rpartition(".")[2]: value for key, value in saved.items() if key.rpartition(".")[0] == name}
        if not parameter.requires_grad or not own:
            continue
        if zero:
            for moment in MOMENTS:
                _set_zero_moment(parameter, moment, own[moment])
        else:
            inner.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in own.items()}
    if zero:
        steps = [value for name, value in saved.items() if name.endswith(".step")]
        for state in inner.optimizer.state.values():  # type: ignore[attr-defined]
            if steps and "step" in state:
                state["step"] = (
                    steps[0].to(state["step"].device, copy=True) if torch.is_tensor(state["step"]) else float(steps[0])
                )


def _create_zero_moments(inner: Any) -> None:
    """A fresh engine has no moments to write into before its first step. Raises: CheckpointError below stage 3."""
    if not hasattr(inner, "fp32_partitioned_groups_flat"):
        raise CheckpointError(
            "Resuming under ZeRO-1 or ZeRO-2 is not supported; resume on one process, under DDP or under ZeRO-3."
        )
    for flat in inner.fp32_partitioned_groups_flat:
        inner.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device)} | {
            moment: torch.zeros_like(flat) for moment in MOMENTS
        }


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


def _zero_step(inner: Any) -> Tensor:
    for state in inner.optimizer.state.values():
        if "step" in state:
            return torch.as_tensor(state["step"], dtype=torch.float32).reshape(())
    return torch.zeros(())
