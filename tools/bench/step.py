"""A training step against the model for pretraining of transformers: MAE, wav2vec 2.0, masked language modelling."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch
import transformers

from mmssl.training.plan import counting_flops
from tools.bench.machine import peak, waits
from tools.bench.peers import PEERS
from tools.bench.turns import by_turns, forget_peak, high_water, resident


def run(method: str = "mae", batch: str = "4", pairs: str = "5", device: str = "cpu", precision: str = "fp32",
        compiled: str = "false", memory: str = "true", best: str = "", words: str = "") -> dict[str, Any]:  # fmt: skip
    """Whole steps (forward, backward, AdamW) of the same weights on the same batch, by turns.

    Args:
        method: mae, wav2vec2 or mlm.  batch: samples of a step.  precision: fp32, or bf16 for autocast.
        compiled: whether our blocks are compiled, as by `train.compile`; theirs are not, as they are shipped.
        memory: whether to measure memory as well, in a process for each side.
        best: TFLOP a second of the device in that precision; those of a product of large matrices if empty.
        words: of the recipe, for other shapes: "model.depth=2 model.hidden_size=384".
    Returns: `time_ratio` (ours : theirs, median over pairs), its spread, `memory_ratio` (at the peak, with weights, gradients
        and moments), and the losses of both before the first step, which must agree to 1e-4. Of ours tokens a second, hidden
        ones included, `utilisation`, the share of `best` that its products have, and how often the host waits in a step.
    """
    ours, theirs = PEERS[method](int(batch), device, *words.split())
    losses = {"ours": ours.check(), "theirs": theirs.check()}
    apart = abs(losses["ours"] - losses["theirs"]) / abs(losses["theirs"])
    if apart > 1e-4:
        raise RuntimeError(f"the two sides compute different losses, {losses}; there is nothing to time")
    with counting_flops() as flops_:
        ours.loss().backward()
    ours.optimizer.zero_grad(set_to_none=True)
    flops = flops_()
    if compiled == "true":
        ours.compile()
    ways = {"ours": lambda: ours.step(precision), "theirs": lambda: theirs.step(precision)}
    found = {
        "name": f"{method}, {ours.what}, batch {batch}, {precision}, {device}{', compiled' if compiled == 'true' else ''}",
        **by_turns(ways, int(pairs), warm=2).figures(),
        "loss": {name: round(value, 6) for name, value in losses.items()},
        "loss_difference": apart,
    }
    seconds = found["seconds"]["ours"]
    most = float(best) * 1e12 if best else peak(device, precision)
    found |= {
        "tokens_a_second": round(ours.tokens / seconds),
        "teraflop": round(flops / 1e12, 4),
        "utilisation": round(flops / seconds / most, 3),
        "best_teraflops": round(most / 1e12, 3),
        "host_waits": waits(ways["ours"]),
    }
    if memory == "true":
        peaks = {name: _peak(method, name, batch, device, precision, compiled, words) for name in ways}
        found["memory_ratio"] = round(peaks["ours"] / peaks["theirs"], 3)
        found["mebibytes"] = {name: round(value / 2**20) for name, value in peaks.items()}
    return found | {"peer": f"transformers {theirs.what}", "peer_version": transformers.__version__}


def _peak(*words: str) -> int:
    """Bytes beyond what stood before the model was built, in a fresh process."""
    done = subprocess.run([sys.executable, "-m", __name__, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(method: str, side: str, batch: str, device: str, precision: str, compiled: str, words: str) -> int:
    """Three steps of one side; the other is let go of before."""
    before = resident()
    found = getattr(PEERS[method](int(batch), device, *words.split()), side)
    if compiled == "true" and side == "ours":
        found.compile()
    forget_peak()
    for _ in range(3):
        found.step(precision)
    return high_water() - before if device == "cpu" else torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
