import pytest
import torch
from torch.testing import assert_close

from mmssl.config import OptimOptions
from mmssl.training.objective import PROBE_SCALE, Objective, Standardise
from mmssl.training.optim import PROBE_LR, build_optimizer, parameter_groups, set_rates
from mmssl.types import Clock


@pytest.fixture
def objective(tiny):
    """A tiny method with a probe of two classes."""
    return Objective(tiny()[0], classes=2)


def names_of(objective, group):
    names = {id(p): name for name, p in objective.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def test_only_weights_of_linear_and_convolutional_layers_decay(objective):
    decayed, free, probe = parameter_groups(objective, OptimOptions(weight_decay=0.3))
    assert [group["weight_decay"] for group in (decayed, free, probe)] == [0.3, 0.0, 0.0]
    blocks = ["transformer.prenet.0", *(f"transformer.blocks.{i}" for i in range(3))]
    matrices = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    wanted = {f"method.student.encoder.{block}.{matrix}.weight" for block in blocks for matrix in matrices}
    wanted |= {f"method.decoder.{name}.weight" for name in ("convs.0", "convs.1", "proj")}
    assert names_of(objective, decayed) == wanted | {"method.student.encoder.features.proj.weight"}
    spared = names_of(objective, free)
    assert "method.student.encoder.transformer.extra.tokens" in spared  # three dimensions, and no matrix
    assert "method.student.encoder.transformer.input_norm.weight" in spared
    assert all(name.endswith(("bias", "extra.tokens")) or "norm" in name for name in spared)
    assert names_of(objective, probe) == {"probe.weight", "probe.bias"}


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_every_trained_weight_is_in_one_group_and_no_teacher_is_in_any(objective, decay):
    groups = parameter_groups(objective, OptimOptions(decay=decay))
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in objective.parameters()}
    assert not set(ids) & {id(p) for p in objective.method.teacher.network.parameters()}


def test_everything_decays_if_asked_to_but_the_probe(objective):
    method, probe = parameter_groups(objective, OptimOptions(decay="all", weight_decay=0.3))
    assert names_of(objective, method) == {f"method.{name}" for name, _ in objective.method.named_parameters()}
    assert (method["weight_decay"], probe["weight_decay"]) == (0.3, 0.0)


def test_frozen_weights_are_in_no_group(objective):
    frozen = objective.method.student.encoder.features.proj
    frozen.requires_grad_(False)
    ids = {id(p) for group in parameter_groups(objective, OptimOptions()) for p in group["params"]}
    assert not ids & {id(p) for p in frozen.parameters()}


def test_without_a_probe_there_is_no_group_for_it(tiny):
    assert [g["role"] for g in parameter_groups(Objective(tiny()[0]), OptimOptions())] == ["method", "method"]


def test_an_update_is_that_of_adamw(objective):
    options = OptimOptions(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
    optimizer = build_optimizer(objective, options)
    set_rates(optimizer, 0.02)
    weight, bias = objective.method.decoder.proj.weight, objective.method.decoder.proj.bias
    rules = [(weight, weight.detach().double(), 0.5), (bias, bias.detach().double(), 0.0)]
    first = [torch.zeros_like(p).double() for p, _, _ in rules]
    second = [torch.zeros_like(p).double() for p, _, _ in rules]
    for step in (1, 2, 3):
        for i, (parameter, value, decay) in enumerate(rules):
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + i))
            parameter.grad = gradient.clone()
            first[i] = 0.8 * first[i] + 0.2 * gradient.double()
            second[i] = 0.9 * second[i] + 0.1 * gradient.double() ** 2
            update = first[i] / (1 - 0.8**step) / ((second[i] / (1 - 0.9**step)).sqrt() + 1e-6)
            rules[i] = (parameter, value * (1 - 0.02 * decay) - 0.02 * update, decay)
        optimizer.step()
    for parameter, value, _ in rules:
        assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_the_probe_keeps_its_own_rate(objective):
    optimizer = build_optimizer(objective, OptimOptions())
    for rate in (0.0, 0.25):
        set_rates(optimizer, rate)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate, PROBE_LR]


def test_each_update_of_a_run_has_the_rate_of_its_step(tiny_recipe, trained):
    seen = []

    def watch(run):
        create = run.trainer.create_optimizer

        def watched(model=None):
            optimizer = create(model)
            optimizer.register_step_pre_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
            return optimizer

        run.trainer.create_optimizer = watched

    run = trained(tiny_recipe("optim.lr=0.8", "optim.warmup=2", "train.steps=6", "train.micro_batch=4"), watch)
    rates = [0.0, 0.4, 0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5)]  # (1 + cos(pi * k / 4)) / 2 of 0.8
    assert seen == [pytest.approx([rate, rate, PROBE_LR]) for rate in rates]
    assert [line["lr"] for line in run.lines if "lr" in line] == pytest.approx(rates)


# The probe -------------------------------------------------------------------------------------------------------------


def test_the_probe_standardises_by_the_batch_and_afterwards_as_calibrated():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3, 0]) + 5
    layer = Standardise(4)
    out = layer.train()(x)
    assert_close(out.mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    assert_close(out.var(0, correction=0), torch.tensor([1.0, 1, 1, 0]), rtol=0, atol=1e-3)
    assert_close(layer.eval()(x), x, rtol=0, atol=1e-4)
    layer.calibrate(x)
    assert_close(layer(x + 1)[:, 0], (x[:, 0] + 1 - x[:, 0].mean()) / x[:, 0].std(correction=0), rtol=1e-4, atol=1e-4)


def test_labels_reach_no_gradient_of_the_method(tiny):
    gradients = []
    for classes, label in ((0, 0), (2, 0), (2, 1)):
        method, batch = tiny()
        objective = Objective(method, classes)
        tensors = batch.tensors() | {"label": torch.tensor([label, 1, -1])}
        objective(tensors, batch.keys, Clock(0, 10))["total"].backward()
        gradients.append([p.grad for p in method.parameters()])
        if classes:
            assert float(objective.probe.weight.grad.abs().sum()) > 0
    for other in gradients[1:]:
        assert_close(other, gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("labels", [[0, 1, 0], [0, 1, -1], [-1, -1, -1]])
def test_the_probe_learns_softmax_regression_from_labelled_samples_alone(tiny, labels):
    method, batch = tiny()
    objective = Objective(method, classes=2)
    objective(batch.tensors() | {"label": torch.tensor(labels)}, batch.keys, Clock(0, 10))["total"].backward()
    with torch.no_grad():
        x = objective.standardise(method(batch, Clock(0, 10)).embedding)
        known = [i for i, label in enumerate(labels) if label >= 0]
        slope = torch.zeros(2, 16)
        for i in known:
            for c in range(2):  # both classes have probability 1/2, as the probe starts from zero
                slope[c] += (0.5 - (labels[i] == c)) * x[i] / len(known)
    assert_close(objective.probe.weight.grad / PROBE_SCALE, slope, rtol=1e-3, atol=1e-5)


def test_the_probe_learns_and_leaves_the_encoder_bitwise_as_it_would_be_without(tiny_recipe, trained):
    overrides = ("train.steps=4", "optim.clip=0.05", "train.micro_batch=4")
    runs = [trained(tiny_recipe(*overrides, f"watch.linear={linear}")) for linear in ("true", "false")]
    with_probe, without = (run.objective for run in runs)
    assert without.probe is None
    assert float(with_probe.probe.weight.detach().abs().max()) > 0.01  # it started from zero
    assert all(line["grad_norm"] > 0.05 for run in runs for line in run.lines if "grad_norm" in line)  # it is clipped
    assert_close(dict(with_probe.method.state_dict()), dict(without.method.state_dict()), rtol=0, atol=0)
    for one, other in zip(with_probe.method.parameters(), without.method.parameters()):
        moments = [run.trainer.optimizer.state[p]["exp_avg_sq"] for run, p in zip(runs, (one, other))]
        assert_close(*moments, rtol=0, atol=0)
