import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from mmssl.config import Recipe
from mmssl.errors import RecipeError
from mmssl.model.recompute import forget_nothing, forgetting, recompute
from mmssl.model.transformer import Block, Mlp
from mmssl.random import generator
from mmssl.training.plan import counting_activations
from mmssl.training.pretrain import prepare


def tensors(*shape):
    return torch.randn(shape, generator=generator("recompute", *shape)).requires_grad_()


def gradients(module, x):
    module.zero_grad()
    x.grad = None
    outputs = module(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.sin().sum() for output in outputs).backward()
    return [x.grad.clone(), *(p.grad.clone() for p in module.parameters())]


def lives_after(module, inner, x):
    """Whether what `inner` gave is still in memory when `module` has run."""
    given = []
    handle = inner.register_forward_hook(lambda _, __, output: given.append(weakref.ref(output)))
    kept = module(x)
    handle.remove()
    gc.collect()
    alive = given[0]() is not None
    del kept
    return alive


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "gelu_quick", "swiglu"])
def test_an_mlp_forgets_what_a_gelu_gives_and_has_the_same_gradients_to_the_bit(activation):
    torch.manual_seed(0)
    mlp, x = Mlp(12, 40, activation), tensors(3, 5, 12)
    keeps = copy.deepcopy(mlp)
    keeps.forgets = False
    for one, other in zip(gradients(mlp, x), gradients(keeps, x), strict=True):
        assert torch.equal(one, other)
    assert lives_after(keeps, keeps.act, x)
    assert lives_after(mlp, mlp.act, x) == (not activation.startswith("gelu") or activation == "gelu_quick")


def test_gradients_of_gradients_pass_through_what_was_forgotten():
    torch.manual_seed(0)
    act, then, x = nn.GELU(), nn.Linear(6, 6).double(), tensors(4, 6).detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: forgetting(act, x, then), x)
    assert torch.autograd.gradgradcheck(lambda x: forgetting(act, x, then), x)


def test_under_autocast_the_gradients_are_the_same_too():
    torch.manual_seed(0)
    mlp, x = Mlp(12, 40), tensors(3, 5, 12)
    keeps = copy.deepcopy(mlp)
    keeps.forgets = False
    found = []
    for module in (mlp, keeps):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(module, x))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_block_forgets_what_its_norms_give_and_has_the_same_gradients_to_the_bit(kind, precision):
    torch.manual_seed(0)
    block, x = Block(12, 2, norm="pre", norm_kind=kind), tensors(3, 5, 12)
    keeps = copy.deepcopy(block)
    forget_nothing(keeps)
    found = []
    for module in (block, keeps):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found.append(gradients(module, x))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    if precision == "fp32":
        for name in ("norm1", "norm2"):
            assert lives_after(keeps, getattr(keeps, name), x)
            assert not lives_after(block, getattr(block, name), x)


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float32, 2), (torch.bfloat16, 1)])
def test_a_norm_is_computed_again_as_it_was_under_autocast(dtype, calls):
    """CUDA's norms refuse tokens of another type than their weights unless autocast is on, which it is not when the loss is
    differentiated. Of tokens in half precision nothing would be gained."""
    torch.manual_seed(0)
    block, x, heard = Block(12, 2, norm="pre"), tensors(3, 5, 12), []
    for norm in (block.norm1, block.norm2):
        norm.register_forward_pre_hook(lambda *_: heard.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = block(x.to(dtype))
    out.float().square().sum().backward()
    assert heard == [True] * 2 * calls


def test_autocast_keeps_no_rounded_copy_of_what_a_norm_gives():
    torch.manual_seed(0)
    block, x = Block(12, 2, norm="pre"), tensors(3, 5, 12)
    keeps, counts = copy.deepcopy(block), []
    forget_nothing(keeps)
    for module in (block, keeps):
        with torch.autocast("cpu", torch.bfloat16), counting_activations(module) as count:
            module(x)
        counts.append(count())
    unseen = (block.attn.qkv, block.mlp.fc1, block.mlp.fc2)  # whose rounded weights are kept where the count does not look
    given = x.numel() * (1 + 1 + 4)  # by two norms and a GELU
    assert counts[1] - counts[0] == 2 * (given + sum(linear.weight.numel() for linear in unseen))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_that_is_computed_twice_has_the_same_gradients_with_the_same_dropout(norm):
    torch.manual_seed(0)
    block, x = Block(12, 2, norm=norm, dropout=0.3, drop_path=0.4), tensors(3, 5, 12)
    twice = nn.Sequential(copy.deepcopy(block))
    assert recompute(twice, (Block,)) == 1
    found = []
    for module in (block, twice):
        torch.manual_seed(7)
        found.append(gradients(module, x))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert lives_after(block, block.mlp.fc1, x)
    assert not lives_after(twice, twice[0].mlp.fc1, x)
    with torch.no_grad():
        assert not twice(x)[0].requires_grad


def test_a_run_that_recomputes_has_the_same_losses(trained, tiny_recipe):
    runs = [trained(tiny_recipe("model.dropout=0.1", f"train.recompute={value}")) for value in ("false", "true")]
    losses = [[line["loss"] for line in run.lines if "loss" in line] for run in runs]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_where_there_are_no_blocks_it_is_refused(image_folder, tmp_path):
    words = (
        f"data.path={image_folder}",
        f"out={tmp_path / 'run'}",
        "train.recompute=true",
        "train.steps=1",
        "train.global_batch=8",
    )
    with pytest.raises(RecipeError, match=r"^train\.recompute: nothing here has blocks"):
        prepare(Recipe.load("vision/simclr-cifar10-cpu", *words, "train.global_batch=8"))


def test_a_run_that_embeds_in_parts_has_the_same_losses(trained, image_folder, tmp_path):
    (tmp_path / "byol.yaml").write_text(
        f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
        "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 2, heads: 2}\n"
        "method: {name: byol, hidden: 16, dim: 8}\n"
        "views: {crops: [{count: 2, scale: [0.4, 1.0]}]}\n"
        "train: {steps: 2, global_batch: 8, device: cpu, log_every: 1}\n"
    )
    words = [(), ("train.encoder_batch=3",)]
    runs = [trained(Recipe.load(tmp_path / "byol.yaml", f"out={tmp_path / 'run'}", *more)) for more in words]
    whole, parts = ([line["loss"] for line in run.lines if "loss" in line] for run in runs)
    assert len(whole) == 2
    assert parts == pytest.approx(whole, rel=1e-5)
    networks = [runs[1].objective.method.student, runs[1].objective.method.teacher.network]
    assert [network.at_once for network in networks] == [3, 3]


def test_embedding_in_parts_is_refused_where_it_would_change_the_result_or_nothing(tiny_recipe, image_folder, tmp_path):
    with pytest.raises(
        RecipeError, match=r"^train\.encoder_batch: nothing here compares whole samples; take train\.micro_batch"
    ):
        prepare(tiny_recipe("train.encoder_batch=2"))
    words = (f"data.path={image_folder}", f"out={tmp_path / 'other'}", "train.steps=1", "train.encoder_batch=4")
    with pytest.raises(RecipeError, match=r"^train\.encoder_batch: batch normalisation in the encoder"):
        prepare(Recipe.load("vision/simclr-cifar10-cpu", *words, "train.global_batch=8"))


def test_a_model_of_a_library_does_so_by_its_own_switch():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes))
    assert recompute(nn.Sequential(model), (Block,)) == 1
    assert model.is_gradient_checkpointing
