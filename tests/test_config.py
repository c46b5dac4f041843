import copy
import random

import pytest
import yaml

from mmssl.config import MAX_BYTES, Recipe, find_recipe, keyed, load_recipe, read_yaml, shipped_recipes
from mmssl.config.recipe import read_recipe
from mmssl.errors import RecipeError
from mmssl.registry import modality
from mmssl.schedules import Schedule
from tools.mutations import attack, mutate

DEMO = "vision/data2vec2-demo"


def refused(*overrides, recipe=DEMO) -> str:
    """The message of the error."""
    with pytest.raises(RecipeError) as caught:
        Recipe.load(recipe, *overrides)
    assert caught.value.code == 2
    return str(caught.value)


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


# What is right ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_right_and_survives_its_own_dump(name, tmp_path):
    recipe = load_recipe(name, "data.path=somewhere")
    again = load_recipe(written(tmp_path, recipe.dump()))
    assert again.model_dump() == recipe.model_dump()
    assert all(member.build_views() is not None for member in recipe.members.values())


@pytest.mark.parametrize("word", ["model.image_size=1000000000000", "model.hidden_size=1000000000000"])
def test_sizes_beyond_any_memory_are_refused_by_their_block(word):
    with pytest.raises(RecipeError, match=r"\n  model\b.*"):
        Recipe.load(DEMO, "data.path=somewhere", word)


def test_overrides_are_yaml_and_the_last_one_wins():
    recipe = Recipe.load(DEMO, "optim.lr=1e-3", "optim.betas=[0.8, 0.9]", "watch.path=null", "train.steps=7", "train.steps=8")
    assert recipe.optim.lr == 0.001
    assert recipe.optim.betas == (0.8, 0.9)
    assert (recipe.watch.path, recipe.train.steps) == (None, 8)
    assert Recipe.load(DEMO, optim__lr=0.5, data__path="a: b").data.path == "a: b"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "1.e-3", "+1e-3", "0.001"])
def test_a_number_may_be_written_with_an_exponent(text, tmp_path):
    assert Recipe.load(DEMO, f"optim.lr={text}").optim.lr == 0.001
    path = written(tmp_path, find_recipe(DEMO).read_text().replace("lr: 2.0e-3", f"lr: {text}"))
    assert Recipe.load(path).optim.lr == 0.001


def test_short_names_stand_for_long_ones(tmp_path):
    recipe = Recipe.load(DEMO, "method=data2vec2", "data=elsewhere/images")
    assert (recipe.method.name, recipe.data.path) == ("data2vec2", "elsewhere/images")
    assert read_recipe(DEMO, "model=runs/a/model")["model"]["init"] == "runs/a/model"
    raw = yaml.safe_load(find_recipe(DEMO).read_text()) | {"data": "elsewhere"}
    path = written(tmp_path, yaml.safe_dump(raw))
    assert Recipe.load(path, "data.modality=vision").data.path == "elsewhere"


def test_a_plain_number_is_a_constant_schedule():
    assert Recipe.load(DEMO, "method.momentum=0.5").method.momentum == Schedule(0.5, 0.5)
    assert Recipe.load(DEMO, "method.momentum=1").method.momentum == Schedule(1.0, 1.0)


def test_a_recipe_is_named_after_its_file_and_building_depends_on_its_seed_alone():
    assert Recipe.load(DEMO).out == "runs/data2vec2-demo"
    first, same, other = (Recipe.load(DEMO, f"train.seed={seed}").build().state_dict() for seed in (0, 0, 1))
    assert all(first[name].equal(same[name]) for name in first)
    assert not first["student.encoder.features.proj.weight"].equal(other["student.encoder.features.proj.weight"])


# What is wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        # unknown names, with the nearest
        ("optim.lrr=1", ["optim.lrr: unknown key (did you mean lr?)", "weight_decay"]),
        ("trian.steps=1", ["trian: unknown key (did you mean train?)"]),
        ("method=data2vec", ["method.name: found 'data2vec', known methods are", "did you mean data2vec2?"]),
        ("data.modality=visoin", ["data.modality: ", "'visoin'", "vision"]),
        # wrong types
        ("optim.lr=fast", ["optim.lr: found 'fast'; input should be a valid number"]),
        ("train.steps=2.5", ["train.steps: found 2.5; input should be a valid integer"]),
        ("optim.betas=[0.9]", ["optim.betas"]),
        ("train=5", ["train: found 5"]),
        ("train.precision=fp16", ["train.precision: found 'fp16'; input should be 'fp32' or 'bf16'"]),
        ("method.name=[data2vec2]", ["method.name: found ['data2vec2'], known methods are"]),
        ("data.modality={a: 1}", ["data.modality: found {'a': 1}; input should be a valid string"]),
        ("method.momentum={start: 0.9, end: 1, shape: sine}", ["method.momentum.shape: found 'sine'", "'linear', 'cosine'"]),
        # out of range
        ("optim.lr=0", ["optim.lr: found 0; input should be greater than 0"]),
        ("data.buckets=0", ["data.buckets: found 0; input should be greater than or equal to 1"]),
        ("data.budget=many", ["data.budget: found 'many'"]),
        ("watch.guard={target_std: low}", ["watch.guard.target_std: found 'low'"]),
        ("watch.guard_after=-1", ["watch.guard_after: found -1"]),
        ("watch.samples=3", ["watch.samples: found 3; input should be greater than or equal to 20"]),
        ("optim.lr=.inf", ["optim.lr: found inf; input should be a finite number"]),
        ("views.std=[.nan]", ["views.std.0: found nan; input should be a finite number"]),
        ("views.aspect=[1, .inf]", ["views.aspect.1: found inf; input should be a finite number"]),
        ("views.mask={ratio: .nan}", ["views.mask.ratio: found nan; input should be a finite number"]),
        ("method.decoder.noise=.nan", ["method.decoder.noise: found nan; input should be a finite number"]),
        ("method.momentum={start: .nan, end: 1}", ["method.momentum.start: found nan; input should be a finite number"]),
        # what does not fit together
        ("model.image_size=30", ["model.image_size: 30 is not a multiple of patch_size 4; try model.image_size=28"]),
        ("model.patch_size=0", ["model.image_size: ", "patch_size 0"]),
        ("model.heads=5", ["model.heads: hidden_size 96 is not a multiple of 5 heads"]),
        ("model.hidden_size=98", ["model.h"]),
        ("model.mlp_ratio=-1", ["model.mlp_ratio: -1.0"]),
        ("model.depth=0", ["model.", "depth"]),
        ("method.top_k=5", ["method.top_k: 5 layers to average, the trunk has 4 (model.depth)"]),
        ("method.momentum=1.5", ["method.momentum: ", "between 0 and 1"]),
        ("method.decoder.groups=7", ["method.decoder.groups: 7", "decoder.dim 96"]),
        ("method.decoder.groups=0", ["method.decoder: ", "groups", "at least 1"]),
        ("method.decoder.dim=-96", ["method.decoder: dim", "at least 1"]),
        ("method.decoder.kernel=4", ["method.decoder: ", "kernel odd"]),
        ("method.decoder.kernel=-1", ["method.decoder: ", "kernel"]),
        ("model.extra_tokens=0", ["method.cls_weight: needs model.extra_tokens"]),
        ("views.mask.ratio=0.999", ["views.mask.ratio: 0.999 of 64 patches leaves nothing or everything visible"]),
        ("views.mask.ratio=0", ["views.mask.ratio: 0.0 of 64 patches"]),
        ("views.mask.ratio=1e300", ["views.mask.ratio: 1e+300 of 64 patches"]),
        ("views.mask.width=9", ["views.mask: ", "width between 1 and 8"]),
        ("views.scale=[1, 0.5]", ["views.scale: ", "smallest <= largest"]),
        ("views.mean=[0.5, 0.5]", ["views.mean, std: ", "one number or 1"]),
        ("train.epochs=3", ["train: give either steps or epochs"]),
        ("train.steps=null", ["train: give either steps or epochs"]),
        ("data.streaming=true", ["data.readers: must be a multiple of data.workers"]),
    ],
)
def test_a_mistake_is_answered_with_its_key_and_the_mend(override, words):
    more = ["data.workers=3"] if override.startswith("data.streaming") else []
    message = refused(override, *more)
    assert message.startswith(f"{DEMO} has ")
    for word in words:
        assert word in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("views.mask.copys=3", "views.mask.copys: unknown key (did you mean copies?); allowed are kind, ratio, "),
        ("method.decoder.kernal=3", "method.decoder.kernal: unknown key (did you mean kernel?)"),
        ("method.momentum={start: 0.9, ende: 1}", "method.momentum.ende: unknown key (did you mean end?)"),
    ],
)
def test_an_unknown_name_in_an_inner_block_is_answered_with_the_nearest(override, words):
    assert words in refused(override)


def test_all_mistakes_are_told_at_once():
    message = refused("optim.lrr=1", "train.steps=many", "watch.every=-1", "views.flop=0", "method.top=1")
    assert message.startswith(f"{DEMO} has 5 errors:\n")
    for key in ("optim.lrr: ", "train.steps: ", "watch.every: ", "views.flop: ", "method.top: "):
        assert f"\n  {key}" in message
    unknown = refused("method=nothing", "data.modality=smell", "optim.lrr=1")
    assert all(f"\n  {key}: " in unknown for key in ("method.name", "data.modality", "optim.lrr"))


def test_a_missing_block_is_named(tmp_path):
    message = refused(recipe=written(tmp_path, "data: {path: x}\ntrain: {steps: 1}\n"))
    assert "data.modality: missing" in message
    assert "method.name: found None" in message
    assert "model: missing" in message


@pytest.mark.parametrize("text", ["optim.lr", "=3", "", "out.folder=a"])
def test_an_override_that_is_none_is_refused(text):
    assert "key.sub=value" in refused(text) or "it has no key 'folder'" in refused(text)


def test_a_recipe_that_does_not_exist_is_answered_with_the_nearest():
    assert f"did you mean {DEMO}?" in refused(recipe="vision/data2vec2-dmo")


# What the views decide of the model ---------------------------------------------------------------------------------------


@pytest.fixture
def configured(monkeypatch):
    """Function: what `configure` of images does; returns the list of its calls."""

    def use(configure):
        calls = []
        changed = modality("vision")._replace(configure=lambda *a: (calls.append(a), configure(*a))[1])
        monkeypatch.setattr("mmssl.config.recipe.modality", lambda name: changed)
        return calls

    return use


def test_options_that_the_views_decide_are_filled_in_once_and_saved(configured, tmp_path):
    calls = configured(lambda model, views: {"image_size": model["patch_size"] * 9})
    recipe = Recipe.load(DEMO, "views.flip=0.25")
    assert recipe.model.image_size == recipe.config().image_size == 36
    assert recipe.build_views().size == 36
    assert recipe.build().student.encoder.features.grid == (9, 9)
    assert yaml.safe_load(recipe.dump())["model"]["image_size"] == 36
    assert len(calls) == 1
    model, views = calls[0]
    assert (model["patch_size"], model["image_size"], views["flip"]) == (4, 32, 0.25)
    assert "init" not in model
    calls = configured(lambda model, views: model)  # as they are read again
    assert Recipe.load(written(tmp_path, recipe.dump())).model_dump() == recipe.model_dump()


def test_a_mistake_in_what_the_views_decide_is_told_with_the_others(configured):
    def fail(text):
        def configure(model, views):
            raise ValueError(text)

        return configure

    configured(fail("views.tokenizer: no such folder"))
    message = refused("optim.lr=0")
    assert message.startswith(f"{DEMO} has 2 errors:\n")
    assert "\n  views.tokenizer: no such folder" in message
    assert "\n  optim.lr: found 0" in message
    configured(fail("vocab_size: too small"))
    assert "\n  model.vocab_size: too small" in refused()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("views.tokenizer: none", "views.tokenizer: none"),
        ("data.path: empty", "data.path: empty"),
        ("tokenizer: none", "views.tokenizer: none"),
        ("viewsize: none", "views.viewsize: none"),
        ("model: none", "views.model: none"),
    ],
)
def test_a_message_that_names_its_key_keeps_it(text, found):
    assert keyed("views", ValueError(text)) == found


# YAML ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ["line 3", "key 'a' is given twice"]),
        ("optim: {lr: 1, lr: 2}\n", ["line 1", "key 'lr' is given twice"]),
        ("a: &x [1]\nb: *x\n", ["line 2", "aliases are not allowed"]),
        ("a: [1, 2\nb: 3\n", ["not valid YAML"]),
        ("a: !!python/object/apply:os.system [echo]\n", ["line 1", "not valid YAML"]),
        ("a: " + "[" * 40 + "]" * 40, ["nested too deeply"]),
        ("a: " + "[" * 100_000, ["nested too deeply"]),
        ("{" * 50, ["nested too deeply"]),
        ("a: 1\nb: \x00\n", ["line 2", "not valid YAML", "'\\x00' is not allowed"]),
        ("? [1, 2]\n: 3\n", ["line 1"]),
        ("? {a: 1}\n: 3\n", ["line 1"]),
        ("a: 2021-13-45\n", ["not valid YAML"]),
        ("<<: {a: 1}\n", ["recipe.yaml"]),
        ("- 1\n", ["holds list, expected the blocks"]),
        ("", ["holds NoneType"]),
        ("3\n", ["holds int"]),
        ("a: 1\n" + "#" * MAX_BYTES, ["larger than"]),
        ("a: 1\n---\nb: 2\n", ["not valid YAML"]),
    ],
    ids=range(18),
)
def test_yaml_that_cannot_be_used_is_refused_with_its_place(tmp_path, text, words):
    message = refused(recipe=written(tmp_path, text))
    assert "recipe.yaml" in message
    for word in words:
        assert word in message


def test_an_alias_bomb_costs_nothing(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]  # 10^12 strings
    assert "aliases are not allowed" in refused(recipe=written(tmp_path, "\n".join(lines)))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00a: 1")
    assert "cannot be read" in refused(recipe=tmp_path / "recipe.yaml")


# Fuzz ------------------------------------------------------------------------------------------------------------------


def test_no_mutation_of_a_recipe_raises_anything_but_a_recipe_error():
    draw, original, lines = random.Random(0), read_yaml(find_recipe(DEMO)), []
    for _ in range(100):
        raw = copy.deepcopy(original)
        done = mutate(raw, draw)
        try:
            Recipe.check(raw)
        except RecipeError as error:
            lines.append(str(error).splitlines())
        except Exception as error:
            pytest.fail(f"{done}: {type(error).__name__}: {error}")
    assert 50 < len(lines) < 100
    assert not [line for _, *problems in lines for line in problems if not (line.startswith("  ") and ": " in line)]


@pytest.mark.parametrize("backbone", [500, [1, 2]])
def test_a_backbone_that_is_no_name_is_one_message(backbone):
    with pytest.raises(RecipeError, match=r"model\.backbone: found"):
        Recipe.load("vision/byol-resnet50", "data=x", f"model.backbone={backbone}")


def test_t31_mutated_recipes_are_refused_by_name_or_build(tmp_path):
    found = attack(tmp_path, 60, seed=0)
    assert found.wrong == []
    assert found.refused + found.built == 60
    assert min(found.refused, found.built) >= 5


def minimal(tmp_path, modality: str, method: str, more: str = "") -> Recipe:
    model = {"text": "{vocab_size: 50, mask_token_id: 4}"}.get(modality, "{}")
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data: {{path: x, modality: {modality}}}\nmodel: {model}\nmethod: {method}\ntrain: {{steps: 1}}\n{more}")
    return Recipe.load(file)


@pytest.mark.parametrize("modality", ["vision", "speech", "text"])
@pytest.mark.parametrize("method", ["data2vec1", "data2vec2"])
def test_what_a_recipe_leaves_open_is_as_in_the_base_recipe_of_its_kind_of_data(modality, method, tmp_path):
    found = minimal(tmp_path, modality, f"{{name: {method}}}")
    base = Recipe.load(f"{modality}/{method}-base")
    same = ("each_norm", "final_norm", "cls_weight", "teacher_features", "teacher_positions", "collect", "beta", "top_k")
    for name in (name for name in same if hasattr(base.method, name)):
        assert getattr(found.method, name) == getattr(base.method, name), name
    assert found.views.mask == base.views.mask
    assert found.model.extra_tokens == base.model.extra_tokens
    if method == "data2vec2":
        assert found.method.decoder == base.method.decoder
        assert found.method.momentum == base.method.momentum


def test_what_a_recipe_says_goes_before_the_defaults_of_its_kind_of_data(tmp_path):
    found = minimal(
        tmp_path,
        "speech",
        "{name: data2vec1, teacher_features: average, momentum: {start: 0.9, end: 1.0}}",
        "views: {mask: {ratio: 0.3}}",
    )
    assert found.method.teacher_features == "average"
    assert found.method.momentum.steps is None  # not completed from another schedule
    assert (found.views.mask.kind, found.views.mask.ratio, found.views.mask.width) == ("span", 0.3, 10)


def test_a_mask_token_outside_the_vocabulary_is_refused_with_its_mend(tmp_path):
    for token in (50, -1):
        with pytest.raises(RecipeError, match=rf"model\.mask_token_id: {token} is no token .* Leave out vocab_size"):
            Recipe.load("text/data2vec1-small", "model.vocab_size=50", f"model.mask_token_id={token}")


@pytest.mark.parametrize("word", ["method.beta=-1", "method.loss_scale=0"])
def test_an_impossible_error_is_refused(word):
    with pytest.raises(RecipeError, match=r"method\.beta"):
        Recipe.load("vision/data2vec2-demo", word)
