"""On two processes: what is bad on one rank is left out on both, under each way of sharding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys, torch
from pathlib import Path
from mmssl.config import Recipe
from mmssl.distributed import rank
from mmssl.training.pretrain import prepare
from mmssl.training.state import model_state, optimizer_state

folder, what, micro, *words = sys.argv[1:]
torch.set_num_threads(1)
run = prepare(Recipe.load(folder + "/tiny.yaml", "out=" + folder + "/run", *words))
trainer, method = run.trainer, run.objective.method
begin, inputs_of, end, states = trainer.begin_update, trainer._prepare_inputs, trainer.end_update, {}

def now():
    return trainer.state.global_step == 2 and rank() == 1

def state():
    parts = model_state(run.objective), optimizer_state(run.objective, trainer.optimizer)
    return {name: tensor.clone() for part in parts for name, tensor in part.items()}

def begin_update():
    if trainer.state.global_step == 2:
        states["before"] = state()
    begin()

def prepare_inputs(inputs):
    inputs = inputs_of(inputs)
    if what == "sample" and now() and trainer.micro == int(micro):
        inputs = {n: t.fill_(float("nan")) if n.endswith(".x") else t for n, t in inputs.items()}
    return inputs

def end_update(control):
    step = trainer.state.global_step
    end(control)
    if step == 3 and "after" not in states:
        states["after"] = state()

if what == "gradient":
    def spoil(gradient):
        return gradient * float("inf") if what and now() and trainer.micro == int(micro) + 1 else gradient

    def after_forward(module, inputs, output):
        if output.requires_grad:
            output.register_hook(spoil)

    method.student.encoder.transformer.blocks[0].mlp.fc1.register_forward_hook(after_forward)
trainer.begin_update, trainer._prepare_inputs, trainer.end_update = begin_update, prepare_inputs, end_update
if "watch.on_nonfinite=rollback" in words:
    rewind = trainer.rewind
    def once(*rest):
        global what
        what = ""
        rewind(*rest)
    trainer.rewind = once
run.train()
assert states["before"].keys() == states["after"].keys()
same = all(torch.equal(states["before"][n], t) for n, t in states["after"].items())
told = {"same": same, "applied": trainer.applied, "rollbacks": trainer.rollbacks}
(Path(folder) / f"told-{rank()}.json").write_text(json.dumps(told))  # what both print may run together
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("profile", "what", "micro", "words"),
    [
        ("cpu2-ddp", "sample", 1, ()),
        ("cpu2-ddp", "gradient", 0, ("watch.on_nonfinite=rollback", "train.max_skips=0")),
        ("cpu2-zero1", "sample", 1, ("watch.on_nonfinite=rollback", "train.max_skips=0")),
        ("cpu2-zero3", "gradient", 0, ()),
        ("cpu2-zero3", "sample", 1, ("watch.on_nonfinite=rollback", "train.max_skips=0")),
    ],
)
def test_t12_what_is_bad_on_one_rank_is_left_out_on_both(image_folder, tmp_path, profile, what, micro, words):
    """T12: N1 to N3 under DDP and ZeRO; going back in the same processes."""
    (tmp_path / "tiny.yaml").write_text(
        f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
        "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 1, heads: 2}\n"
        "method: {name: data2vec2, top_k: 1, momentum: 0.5, decoder: {dim: 16, groups: 4, layers: 2}}\n"
        "optim: {lr: 0.01, clip: 4.0}\n"
        "train: {steps: 4, global_batch: 8, micro_batch: 2, log_every: 1}\n"
        "watch: {samples: 20, every: 0}\nsave: {every: 2}\n"
    )
    (tmp_path / "bad.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)
    arguments = [str(tmp_path / "bad.py"), str(tmp_path), what, str(micro), *words]
    done = subprocess.run(
        ["accelerate", "launch", "--config_file", f"recipes/accelerate/{profile}.yaml", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    back = len(words) > 0
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert told == 2 * [{"same": True, "applied": 4 if back else 3, "rollbacks": int(back)}]
    record = json.loads((tmp_path / "run/replay/step-00000003.json").read_text())
    assert [len(micros) for micros in record["ranks"]] == [2, 2]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert (losses[3] is None) == (not back)
    assert all(losses[step] is not None for step in (1, 2, 4))
