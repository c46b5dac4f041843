import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet18

from mmssl.config import OptimOptions, Recipe
from mmssl.errors import RecipeError
from mmssl.methods.deepcluster import FreshLinear
from mmssl.parts import Prototypes
from mmssl.training.objective import PROBE_SCALE, Objective, Standardise
from mmssl.training.optim import PROBE_LR, build_optimizer, check_whole, clip_each, parameter_groups, schedule, set_rates
from mmssl.types import Clock
from tests.losses.cases import MASKED


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


def before_each_update(look):
    """For `trained`: calls `look(optimizer)` before each update."""

    def watch(run):
        create = run.trainer.create_optimizer

        def watched(model=None):
            optimizer = create(model)
            optimizer.register_step_pre_hook(lambda *_: look(optimizer))
            return optimizer

        run.trainer.create_optimizer = watched

    return watch


def test_each_update_of_a_run_has_the_rate_of_its_step(tiny_recipe, trained):
    seen = []
    watch = before_each_update(lambda optimizer: seen.append([group["lr"] for group in optimizer.param_groups]))
    run = trained(tiny_recipe("optim.lr=0.8", "optim.warmup=2", "train.steps=6", "train.micro_batch=4"), watch)
    rates = [0.0, 0.4, 0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5)]  # (1 + cos(pi * k / 4)) / 2 of 0.8
    assert seen == [pytest.approx([rate, rate, PROBE_LR]) for rate in rates]
    assert [line["lr"] for line in run.lines if "lr" in line] == pytest.approx(rates)


@pytest.mark.parametrize("decay", ["matrices", "above_1d"])
def test_lars_spares_norms_and_biases_of_a_resnet_and_a_learned_scale(decay):
    method = resnet18()
    method.scale = nn.Parameter(torch.tensor(1.0))
    adapted, spared = parameter_groups(stand_in(method), OptimOptions(name="lars", decay=decay))
    names = {id(p): name for name, p in method.named_parameters()}
    found = {names[id(p)] for p in spared["params"]}
    norms = {name for name, module in method.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert found == {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")} | {"fc.bias", "scale"}
    assert (adapted["adapt"], spared["adapt"], spared["weight_decay"]) == (True, False, 0.0)
    assert len(adapted["params"]) + len(found) == len(names)


def stand_in(method):
    """What the optimizer knows of an objective."""
    return SimpleNamespace(method=method, probes=[])


class Freezing(nn.Linear):
    def is_frozen(self, clock):
        return clock.epoch < 2


def small_method():
    method = nn.Module()
    method.student, method.predictor, method.prototypes = nn.Linear(3, 3), nn.Linear(3, 3), Freezing(3, 4)
    method.tokens, method.scale = nn.Parameter(torch.ones(1, 2, 3)), nn.Parameter(torch.tensor(2.0))
    with torch.no_grad():
        for i, p in enumerate(method.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return method


def rates_of(optimizer, method):
    """Name -> rate, decay."""
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in method.named_parameters()}


def test_everything_decays_by_lars_too_if_asked_to_but_what_has_no_dimensions():
    for name in ("lars", "larc"):
        groups = parameter_groups(stand_in(small_method()), OptimOptions(name=name, decay="all"))
        assert [[p.ndim for p in group["params"]] for group in groups if not group["adapt"]] == [[0]]
    assert all(group["adapt"] for group in parameter_groups(stand_in(small_method()), OptimOptions(decay="all")))


def test_parts_can_be_kept_from_decay_or_at_the_peak():
    method, options = (
        small_method(),
        OptimOptions(lr=0.4, weight_decay=0.3, decay="above_1d", exclude=["tokens"], steady=["predictor"]),
    )
    optimizer = build_optimizer(stand_in(method), options, schedule(options))
    set_rates(optimizer, 0.1, Clock(5, 10, 2), method)
    assert rates_of(optimizer, method) == {
        "tokens": (0.1, 0.0),
        "scale": (0.1, 0.0),
        "student.weight": (0.1, 0.3),
        "student.bias": (0.1, 0.0),
        "predictor.weight": (0.4, 0.3),
        "predictor.bias": (0.4, 0.0),
        "prototypes.weight": (0.1, 0.3),
        "prototypes.bias": (0.1, 0.0),
    }


def test_biases_can_have_a_rate_of_their_own_that_follows_the_same_course():
    method, options = small_method(), OptimOptions(lr=0.2, bias_lr=0.0048, scale="linear", steady=["predictor"], warmup=2)
    rate = schedule(options, batch=2048)
    optimizer = build_optimizer(stand_in(method), options, rate)
    for step, share in ((0, 0), (1, 0.5), (2, 1), (6, 0.5)):
        set_rates(optimizer, rate(Clock(step, 10)), Clock(step, 10, 2), method)
        found = {name: lr for name, (lr, _) in rates_of(optimizer, method).items()}
        assert found["student.weight"] == found["tokens"] == pytest.approx(1.6 * share)
        assert found["student.bias"] == found["scale"] == pytest.approx(0.0384 * share)
        assert (found["predictor.weight"], found["predictor.bias"]) == pytest.approx((1.6, 0.0384))


@pytest.mark.parametrize("key", ["exclude", "steady"])
def test_a_part_that_does_not_exist_is_refused_by_name(key):
    with pytest.raises(
        RecipeError, match=f"^optim.{key}: nothing that is trained is called 'predicter' .did you mean predictor"
    ):
        parameter_groups(stand_in(small_method()), OptimOptions(**{key: ["predicter"]}))


def test_weight_decay_follows_its_course_where_there_is_any(objective):
    optimizer = build_optimizer(objective, OptimOptions(weight_decay=0.04, weight_decay_end=0.4))
    for step, wanted in {0: 0.04, 250: 0.09272077938642143, 500: 0.22, 1000: 0.4}.items():
        set_rates(optimizer, 0.1, Clock(step, 1000))
        assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(wanted), 0.0, 0.0]


OPTIMIZERS = [
    {"name": "adamw", "betas": (0.9, 0.999)},
    {"name": "sgd", "nesterov": True},
    *({"name": "lars", "variant": variant} for variant in ("outside", "classic", "popular", "paper")),
    {"name": "larc"},
    {"name": "larc", "trust_clip": True},
]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda options: "-".join(map(str, options.values())))
def test_what_is_frozen_stays_to_the_bit_and_thaws_like_new(options):
    settings = OptimOptions(lr=0.1, weight_decay=0.3, decay="all", **options)

    def train(method, epochs):
        optimizer = build_optimizer(stand_in(method), settings)
        for epoch in epochs:
            set_rates(optimizer, 0.1, Clock(epoch, 10, epoch), method)
            for i, p in enumerate(method.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * epoch + i))
            optimizer.step()
        return {name: p.detach().clone() for name, p in method.prototypes.named_parameters()}, optimizer

    start = dict(small_method().prototypes.named_parameters())
    method = small_method()
    frozen, optimizer = train(method, [0, 1])
    assert_close(frozen, start, rtol=0, atol=0)
    assert all(not t.any() for p in method.prototypes.parameters() for t in optimizer.state[p].values())
    assert not torch.equal(method.student.weight, small_method().student.weight)
    thawed, _ = train(small_method(), [0, 1, 2, 3])
    fresh, _ = train(small_method(), [2, 3])
    assert_close(thawed, fresh, rtol=0, atol=0)
    assert not torch.equal(thawed["weight"], start["weight"])


def test_sgd_has_the_momentum_and_decay_that_were_asked_for():
    method = nn.Linear(3, 2)
    start = method.weight.detach().clone()
    optimizer = build_optimizer(stand_in(method), OptimOptions(name="sgd", momentum=0.8, weight_decay=0.5))
    set_rates(optimizer, 0.1)
    for _ in range(2):
        method.weight.grad = torch.ones(2, 3)
        optimizer.step()
    velocity = 1 + 0.5 * start
    once = start - 0.1 * velocity
    assert_close(method.weight.detach(), once - 0.1 * (0.8 * velocity + 1 + 0.5 * once), rtol=1e-6, atol=1e-6)


def test_each_gradient_is_clipped_by_its_own_norm():
    case = json.loads((Path(__file__).parents[1] / "vectors" / "joint-embedding.json").read_text())["cases"][
        "per_parameter_clip"
    ]
    parameters = [torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for p, gradient in zip(parameters, case["inputs"]["grads"]):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
    clip_each(parameters, case["inputs"]["limit"])  # the third has none
    for p, wanted in zip(parameters, case["expected"]["per_parameter"]):
        assert_close(p.grad, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)
    assert parameters[2].grad is None


@pytest.mark.parametrize(
    ("options", "key"),
    [({"name": "lars"}, "name"), ({"name": "larc"}, "name"), ({"clip_each": 3.0}, "clip_each")],
)
def test_what_shards_would_break_is_refused_under_deepspeed(options, key):
    with pytest.raises(RecipeError, match=rf"^optim\.{key}: .*DDP"):
        check_whole(OptimOptions(**options))
    check_whole(OptimOptions(clip=3.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nesterov=true"], "optim.nesterov: Nesterov's momentum is for optim.name=sgd"),
        (["name=sgd", "momentum=0", "nesterov=true"], "optim.nesterov: "),
        (["variant=classic"], "optim.variant: classic is a variant of lars"),
        (["name=lars", "trust_clip=true"], "optim.trust_clip: is for larc"),
        (["clip=1", "clip_each=1"], "optim.clip_each: optim.clip is set too"),
        (["warmup=0", "warmup_from=0.1"], "optim.warmup_from: 0.1, but there is no warm-up"),
        (["fall=steps"], "optim.fall_at: [], optim.fall is steps"),
        (["fall_at=[0.5]"], "optim.fall_at: [0.5], optim.fall is cosine"),
        (["fall=steps", "fall_at=[0.5, 1.5]"], "optim.fall_at.1: found 1.5"),
        (["fall=none", "lr_end=0.1"], "optim.lr_end: 0.1, but with optim.fall=none"),
        (["fall=exponential", "lr_end=0"], "optim.lr_end: 0, which equal factors never reach"),
        (["scale=cubic"], "optim.scale: found 'cubic'"),
    ],
)
def test_options_that_contradict_each_other_are_refused_with_the_mend(overrides, message):
    with pytest.raises(RecipeError) as error:
        Recipe.load("vision/data2vec2-demo", *(f"optim.{text}" for text in overrides))
    assert f"\n  {message}" in str(error.value)


def test_published_recipes_can_be_written():
    for options in (
        {"name": "lars", "variant": "classic", "lr": 0.3, "scale": "linear", "warmup": 3120, "weight_decay": 1e-4},  # SimCLR
        {"name": "sgd", "lr": 0.03, "weight_decay": 1e-4, "decay": "all", "fall": "steps", "fall_at": [0.6, 0.8]},  # MoCo v1
        {"name": "sgd", "lr": 0.05, "scale": "linear", "decay": "all", "by": "epoch", "steady": ["predictor"]},  # SimSiam
        {"name": "larc", "lr": 4.8, "warmup": 3120, "warmup_from": 0.3, "lr_end": 0.0048, "decay": "all"},  # SwAV
        {"name": "lars", "lr": 0.2, "bias_lr": 0.0048, "scale": "linear", "lr_end": 0.0016, "decay": "above_1d"},  # Barlow
        {"weight_decay": 0.04, "weight_decay_end": 0.4, "decay": "above_1d", "clip_each": 3.0, "lr_end": 1e-6},  # DINO
    ):
        assert schedule(OptimOptions(**options), 4096, 100)(Clock(50_000, 100_000, 50)) > 0


def test_a_run_by_the_epoch_logs_the_rate_that_it_used(tiny_recipe, trained):
    seen = []
    overrides = ("optim.name=sgd", "optim.lr=0.08", "optim.scale=linear", "optim.by=epoch", "train.steps=8")
    run = trained(tiny_recipe(*overrides), before_each_update(lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])))
    peak = 0.08 * 8 / 256
    assert seen == pytest.approx([peak] * 4 + [peak / 2] * 4)  # 32 images: 4 updates an epoch, two epochs
    assert [line["lr"] for line in run.lines if "lr" in line] == seen


def test_each_gradient_of_a_run_is_clipped(tiny_recipe, trained):
    norms = []

    def look(optimizer):
        groups = [group for group in optimizer.param_groups if group["role"] == "method"]
        norms.extend(float(p.grad.norm()) for group in groups for p in group["params"])

    run = trained(tiny_recipe("train.steps=1", "optim.clip_each=0.01"), before_each_update(look))
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    assert sum(norm**2 for norm in norms) ** 0.5 > 0.05  # all together may be longer
    assert next(line["grad_norm"] for line in run.lines if "grad_norm" in line) > 0.05  # what it was before


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


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_the_probe_learns_from_features_that_are_all_the_same_dimension(name, tiny):
    objective = Objective(tiny()[0], classes=2)
    optimizer = build_optimizer(objective, OptimOptions(name=name))
    feature = torch.linspace(-1.7, 1.7, 64)[:, None].expand(64, 16)  # curvature as large as it can be
    labels, losses = (feature[:, 0] > 0.5).long(), []
    for _ in range(60):
        set_rates(optimizer, 0.0)
        loss = F.cross_entropy(objective.probe(feature), labels)
        (PROBE_SCALE * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[-1] < 0.35
    assert max(losses) <= losses[0] + 1e-6


def test_prototypes_decay_and_adapt_as_matrices_and_what_begins_anew_never_does():
    method = nn.ModuleDict({"prototypes": Prototypes(4, 6, learned_gain=True), "fresh": FreshLinear(4, 3)})
    for decay, adapted in (("matrices", {(6, 4), (6, 1)}), ("all", {(6, 4), (6, 1)})):
        groups = parameter_groups(stand_in(method), OptimOptions(name="lars", decay=decay))
        assert {tuple(p.shape) for group in groups if group["adapt"] for p in group["params"]} == adapted


def test_layers_near_the_input_learn_more_slowly(tiny):
    """Twelve blocks at 0.65: the first has 0.65^12, the last 0.65, embeddings, head and decoder the whole rate."""
    objective = Objective(tiny(depth=12)[0], classes=2)
    groups = parameter_groups(objective, OptimOptions(lr=2e-3, layer_decay=0.65))
    factor = {name: group["factor"] for group in groups for name in names_of(objective, group)}
    block = "method.student.encoder.transformer.blocks"
    told = MASKED["layer_decay_scales"]["decay_0_65"]  # of patches, blocks, head; patches have the whole rate in data2vec
    found = [factor[f"{block}.{i}.norm1.weight"] for i in range(12)]
    assert found == pytest.approx(told[1:-1], rel=1e-12)
    assert told[-1] == 1
    assert factor[f"{block}.0.attn.qkv.weight"] == factor[f"{block}.0.norm1.bias"] == pytest.approx(0.00568800, rel=1e-5)
    assert factor[f"{block}.11.mlp.fc2.weight"] == pytest.approx(0.65)
    rest = {value for name, value in factor.items() if not name.startswith(f"{block}.")}
    assert rest == {1.0}
    optimizer = build_optimizer(objective, OptimOptions(lr=2e-3, layer_decay=0.65))
    set_rates(optimizer, 1e-3)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in names_of(objective, group)}
    assert rates[f"{block}.10.attn.proj.weight"] == pytest.approx(0.65**2 * 1e-3)
    assert len(parameter_groups(objective, OptimOptions())) == 3  # with 1 nothing is split
