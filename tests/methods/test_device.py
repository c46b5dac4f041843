"""A step on tensors that pretend to lie on an accelerator: none is left on the host, and the host waits for none."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mmssl.config import Recipe
from mmssl.random import generator
from mmssl.training.objective import Objective
from mmssl.types import Batch, Clock

ROOT, CLOCK = Path(__file__).resolve().parents[2], Clock(0, 100, 0)
SAMPLES, STORED = 8, 128
KINDS = (("vision", "*-cifar10-cpu"), ("speech", "*-demo"), ("spectrogram", "*-demo"))
RECIPES = sorted(f"{kind}/{path.stem}" for kind, names in KINDS for path in (ROOT / "recipes" / kind).glob(f"{names}.yaml"))
READS = (
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
    torch.ops.aten._linalg_check_errors,
)
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.mv, torch.ops.aten.dot, torch.ops.aten.bmm, torch.ops.aten.addmm)


class Waits(TorchDispatchMode):
    """Within a FakeTensorMode: keeps what is computed on the host real, and notes what would make it wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fakes = [t for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)]
        if not fakes and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        packet = function.overloadpacket
        if packet in READS:
            self.found.append(str(packet))
        elif packet is torch.ops.aten.index.Tensor.overloadpacket and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            self.found.append("index by a mask")
        elif packet in PRODUCTS and not args[0].is_floating_point():
            self.found.append(f"{packet} of integers, which CUDA lacks")
        out = function(*args, **kwargs)
        if packet in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source, waits = args[packet is torch.ops.aten.copy_], not kwargs.get("non_blocking", args[2:3] == (True,))
            if waits and source.device != out.device:
                self.found.append(f"copy of {tuple(source.shape)} from {source.device} to {out.device}")
        return out


def pretending(module, mode):
    """Its tensors as if on an accelerator, shared ones still shared."""
    there = {}

    def move(tensor):
        if id(tensor) not in there:
            with mode:
                moved = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda")
            there[id(tensor)] = tensor, moved
        return there[id(tensor)][1]

    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module._apply(move)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


def sample(recipe, i):
    draw = generator("device", i)
    if recipe.data.modality == "vision":
        return Image.fromarray(torch.randint(256, (32, 32, 3), generator=draw, dtype=torch.uint8).numpy())
    return torch.randn(16_000, generator=draw)


def ready(recipe):
    """A method before its first update, and a batch on the host."""
    method, views = recipe.build().train(), recipe.build_views()
    method.attach(STORED, 0)
    samples = [sample(recipe, i) for i in range(SAMPLES)]
    if method.needs_description(CLOCK):
        with torch.no_grad():
            method.on_epoch(CLOCK, method.eval().describe(views.plain([sample(recipe, i) for i in range(STORED)])))
    else:
        method.on_epoch(CLOCK, None)
    made = [views(one, lambda view, i=i: generator("device", i, view)) for i, one in enumerate(samples)]
    batch = Batch(views.collate(made), torch.arange(SAMPLES), tuple(range(SAMPLES)))
    return Objective(method.train(), finish=views.finish), batch


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", RECIPES + [f"vision/{name}-cifar10-cpu views.on_device=true" for name in ("simclr", "dino")])
def test_no_method_waits_for_the_device(name, monkeypatch):
    objective, batch = ready(Recipe.load(*name.split(), "data.path=x"))
    mode, waits = FakeTensorMode(allow_non_fake_inputs=True), Waits()
    pretending(objective, mode)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu", made=torch.Generator: made("cpu"))
    with mode:
        tensors = tree_map_only(torch.Tensor, lambda t: t.to("cuda"), batch.tensors())
        for _ in range(2):  # what is kept from the first step on, as positions of smaller crops are, may be brought there once
            waits.found.clear()
            with waits:
                objective.method.before_step(CLOCK)
                total = objective(tensors, batch.keys, CLOCK)["total"]
                objective.method.after_step(CLOCK)
    assert total.device.type == "cuda"
    assert waits.found == []
