"""A training step against the model for pretraining of transformers: MAE, wav2vec 2.0, masked language modelling."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
import transformers

from mmssl.allocator import keep_freed_memory
from mmssl.training.plan import counting_flops
from tools.bench.aside import Aside, serve
from tools.bench.machine import peak, waits
from tools.bench.peers import PEERS
from tools.bench.turns import by_turns, forget_peak, high_water, resident

BARE = {"THP_MEM_ALLOC_ENABLE": "0"}  # what a program finds that does not import mmssl


def run(method: str = "mae", batch: str = "4", pairs: str = "5", device: str = "cpu", precision: str = "fp32",
        compiled: str = "false", shipped: str = "false", best: str = "", words: str = "") -> dict[str, Any]:  # fmt: skip
    """Whole steps (forward, backward, AdamW) of the same weights on the same batch, by turns, each side in its own process.

    Args:
        method: mae, wav2vec2 or mlm.  batch: samples of a step.  precision: fp32, or bf16 for autocast.
        compiled: whether our blocks are compiled, as by `train.compile`; theirs are not, as they are shipped.
        shipped: whether theirs gets its memory as a program does that does not know mmssl: without huge pages, and by an
            allocator that hands back what is freed. If not, both sides get it as our training does.
        best: TFLOP a second of the device in that precision; those of a product of large matrices if empty.
        words: of the recipe, for other shapes: "model.depth=2 model.hidden_size=384".
    Returns: `time_ratio` (ours : theirs, median over pairs), its spread, `memory_ratio` (at the peak of all steps, with
        weights, gradients and moments), and the losses of both before the first step, which must agree to 1e-4. Of ours tokens
        a second, hidden ones included, `utilisation`, the share of `best` that its products have, and how often the host waits
        in a step.
    """
    settings = (method, batch, device, precision, compiled)
    most = float(best) * 1e12 if best else peak(device, precision)  # before memory is measured, which this takes too
    bare = shipped == "true"
    with (
        Aside(__name__, "ours", *settings, "true", words) as ours,
        Aside(__name__, "theirs", *settings, str(not bare).lower(), words, environment=BARE if bare else None) as theirs,
    ):
        sides = {"ours": ours, "theirs": theirs}
        told = {name: side.ask("facts") for name, side in sides.items()}
        losses = {name: facts["loss"] for name, facts in told.items()}
        apart = abs(losses["ours"] - losses["theirs"]) / abs(losses["theirs"])
        if apart > 1e-4:
            raise RuntimeError(f"the two sides compute different losses, {losses}; there is nothing to time")
        turns = by_turns({name: lambda side=side: side.ask("step") for name, side in sides.items()}, int(pairs), warm=2)
        bytes_ = {name: side.ask("peak") for name, side in sides.items()}
        host_waits = ours.ask("waits")
    found, facts = turns.figures(), told["ours"]
    seconds = found["seconds"]["ours"]
    more = f"{', compiled' if compiled == 'true' else ''}{', each as it is shipped' if bare else ''}"
    return {
        "name": f"{method}, {facts['what']}, batch {batch}, {precision}, {device}{more}",
        **found,
        "loss": {name: round(value, 6) for name, value in losses.items()},
        "loss_difference": apart,
        "tokens_a_second": round(facts["tokens"] / seconds),
        "teraflop": round(facts["flops"] / 1e12, 4),
        "utilisation": round(facts["flops"] / seconds / most, 3),
        "best_teraflops": round(most / 1e12, 3),
        "host_waits": host_waits,
        "memory_ratio": round(bytes_["ours"] / bytes_["theirs"], 3),
        "mebibytes": {name: round(value / 2**20) for name, value in bytes_.items()},
        "peer": f"transformers {told['theirs']['what']}",
        "peer_version": transformers.__version__,
    }


def _side(name: str, method: str, batch: str, device: str, precision: str, compiled: str, keeps: str, words: str) -> None:
    """One of the two, asked for its `facts`, for a `step`, for the bytes of their `peak` and for the `waits` of the host."""
    before = resident()
    pair = PEERS[method](int(batch), device, *words.split())
    side = getattr(pair, name)
    facts = {"what": side.what, "tokens": side.tokens, "loss": side.check()}
    if name == "ours":
        with counting_flops() as flops:
            side.loss().backward()
        side.optimizer.zero_grad(set_to_none=True)
        facts["flops"] = flops()
        if compiled == "true":
            side.compile()
    del pair  # with the other side
    gc.collect()
    gc.freeze()
    forget_peak()
    if keeps == "true" and device == "cpu":
        keep_freed_memory()

    def step() -> None:
        side.step(precision)
        if device != "cpu":
            torch.cuda.synchronize()

    def most() -> int:
        return high_water() - before if device == "cpu" else torch.cuda.max_memory_allocated()

    serve({"facts": lambda: facts, "step": step, "peak": most, "waits": lambda: waits(step)})


if __name__ == "__main__":
    _side(*sys.argv[1:])
