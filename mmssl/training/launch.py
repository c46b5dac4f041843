"""How a run is started: processes, devices, DeepSpeed, and what must not contradict each other."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.integrations import deepspeed as integration

from mmssl.config import Settings
from mmssl.data.sampler import check_batch
from mmssl.distributed import all_sum
from mmssl.errors import RecipeError

T = TypeVar("T")

# The main process may tokenise a corpus, or read all headers, while the others wait; and of all samples that are described, one
# rank may be done long before the other.
DDP_SECONDS = 4 * 3600


def out(recipe: Settings) -> Path:
    """The run folder."""
    name = "-".join(dict.fromkeys(member.method.name for member in recipe.members.values()))  # type: ignore[attr-defined]
    return Path(recipe.out or f"runs/{name}")


def launched() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def training_arguments(recipe: Settings) -> TrainingArguments:
    """Arguments of the Trainer; making them joins the process group.

    Raises: RecipeError for launch settings that contradict each other.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    forced_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise RecipeError(
            "The launch profile asks for FSDP, under which the teacher would not follow the sharded student. "
            "Use DeepSpeed ZeRO-3 for the same saving of memory: recipes/accelerate/gpu-zero3.yaml, or gpu-zero2.yaml."
        )
    if deepspeed and forced_cpu:
        raise RecipeError(
            "ACCELERATE_USE_CPU=true turns DeepSpeed off without a word. Unset it and use recipes/accelerate/cpu2-zero3.yaml."
        )
    for tracker in recipe.train.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise RecipeError(f"train.report_to: {tracker} is not installed; pip install {tracker}, or leave it out.")
    cpu = recipe.train.device == "cpu" or forced_cpu or not torch.cuda.is_available()
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it found nothing else
    import_deepspeed()
    if deepspeed:
        prefer_own_tools()
        remove_stale_locks()
        compile_nothing()
    processes = launched()
    micro, accumulation = batch_split(recipe, processes)
    if cpu and processes > 1 and not deepspeed and not dist.is_initialized():
        # The Trainer hands its time-out to groups with GPUs only; without them they would give up after half an hour.
        dist.init_process_group("gloo", timeout=timedelta(seconds=DDP_SECONDS))
    arguments = TrainingArguments(
        output_dir=str(out(recipe)),
        max_steps=recipe.train.steps or 1,  # replaced once the data are known
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=recipe.optim.clip,
        learning_rate=recipe.optim.lr,
        seed=recipe.train.seed,
        bf16=recipe.train.precision == "bf16" and not deepspeed,
        use_cpu=cpu and not deepspeed,
        ddp_backend="gloo" if cpu and processes > 1 else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        ddp_timeout=DDP_SECONDS,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="steps",
        save_steps=recipe.save.every,
        report_to=[*recipe.train.report_to] or "none",
        disable_tqdm=True,
        log_level="error",
        ignore_data_skip=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,  # loaders are our own
    )
    if arguments.n_gpu > 1:
        print("mmssl: note: one process uses one GPU; start one for each with accelerate launch --multi_gpu.", file=sys.stderr)
        arguments._n_gpu = 1  # or the Trainer would wrap the model in DataParallel, which splits batches after masks were drawn
    return arguments


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """Models of transformers are made and read whole. In a ZeRO-3 run it would split them over ranks as they come, and a
    teacher would be a copy of nothing; the engine splits the student later.
    """
    held = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = held


def import_deepspeed() -> None:
    """Before the progress bar starts: accelerate imports it sooner or later, and it then tries compilers aloud on stderr."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import deepspeed  # noqa: F401
    except Exception as error:  # only a DeepSpeed run needs it, and that one meets the same error again
        logging.getLogger("mmssl").info("deepspeed cannot be imported: %s", error)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def prefer_own_tools() -> None:
    """This environment's ninja before others, activated or not: what one version has built another builds again."""
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if not path.startswith(own):
        os.environ["PATH"] = os.pathsep.join([own, path])


def remove_stale_locks(age: float = 900.0) -> None:
    """Locks of builds of extensions that were killed: DeepSpeed would wait for such a build for ever, without a word.

    age: seconds after which one counts as forgotten if no process of this host holds it open; other hosts may share the folder.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > age and not _is_open(lock):
                lock.unlink()
                print(f"mmssl: note: removed {lock}, which a build that was killed had left behind.", file=sys.stderr)


def compile_nothing() -> None:
    """DeepSpeed on a CPU builds a C++ extension for inference before the first update. Nothing here uses it; it takes a
    compiler and a minute, and a kill meanwhile leaves a lock behind.
    """
    with contextlib.suppress(ImportError):  # which the run reports by itself
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _is_open(file: Path) -> bool:
    """Whether a process of this host has it open, as far as this one may see."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.samefile(file):
                return True
    return False


def main_first(make: Callable[[], T], args: TrainingArguments) -> T | None:
    """What `make` makes on the main process, None on the others, which wait for it; its error reaches all ranks."""
    error, made = None, None
    if args.process_index == 0:
        try:
            made = make()
        except Exception as problem:  # whatever it is, the other ranks must hear of it
            error = problem
    failed = float(all_sum(torch.tensor(float(error is not None), device=args.device)))
    if error is not None:
        raise error
    if failed:
        raise RecipeError("The main process could not prepare the run; its message says why.")
    return made


def batch_split(recipe: Settings, processes: int) -> tuple[int, int]:
    """Samples of a micro-batch and micro-batches of an update on each rank. Raises: RecipeError if they do not divide."""
    share = recipe.train.global_batch // processes
    micro = recipe.train.micro_batch or max(share, 1)
    check_batch(None, recipe.train.global_batch, micro, processes)
    return micro, share // micro


def check_deepspeed(config: dict[str, Any], recipe: Settings) -> None:
    """Refuse a DeepSpeed file that would silently train otherwise than the recipe says. Raises: RecipeError.

    accelerate writes `gradient_clipping: 1.0` where the key is missing, and both have an opinion about precision.
    """
    clip = config.get("gradient_clipping", 0.0)
    if clip != "auto" and float(clip) != recipe.optim.clip:
        raise RecipeError(
            f"optim.clip: the recipe clips gradients at {recipe.optim.clip}, the DeepSpeed file at {clip} "
            "(1.0 if it says nothing); "
            'write "gradient_clipping": "auto" into the file.'
        )
    for what in ("offload_optimizer", "offload_param"):
        if config.get("zero_optimization", {}).get(what, {}).get("device", "none") != "none":
            raise RecipeError(f"The DeepSpeed file sets {what}, which the teacher does not follow; remove it.")
    for engine in ("bf16", "fp16"):
        if config.get(engine, {}).get("enabled") is True:
            raise RecipeError(
                f"train.precision: the DeepSpeed file enables the {engine} engine, which rounds the weights "
                "that the teacher averages; "
                'use "torch_autocast": {"enabled": true, "dtype": "bfloat16"} instead.'
            )
    if (recipe.train.precision == "bf16") != bool(config.get("torch_autocast", {}).get("enabled")):
        raise RecipeError(
            f'train.precision: the recipe says {recipe.train.precision}, and under DeepSpeed bf16 is "torch_autocast": '
            '{"enabled": true, "dtype": "bfloat16"} in its file; make both agree.'
        )
