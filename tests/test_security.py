"""What files of strangers must not do, and what must never leave this machine. A canary is a file that appears if code ran.

Limits of images and sounds: tests/vision/test_decode.py and tests/speech/test_decode.py; names in tables that leave their
root: tests/data/test_sources.py; broken manifests: tests/training/test_checkpoint.py.
"""

import ast
import builtins
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import socket
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from mmssl.cli import main
from mmssl.config import Recipe, read_yaml, shipped_recipes
from mmssl.config.reading import find_recipe
from mmssl.data.quarantine import Quarantine
from mmssl.data.sources import Source
from mmssl.errors import CheckpointError, RecipeError
from mmssl.hub.convert import convert
from mmssl.hub.export import load_encoder
from mmssl.training import checkpoint
from mmssl.training.pretrain import pretrain
from mmssl.training.run_folder import RunFolder
from mmssl.types import Rejected

ROOT = Path(__file__).resolve().parents[1]
TINY = "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 2, heads: 2, prenet_depth: 1}"
TOKEN, PASSWORD = "hf_" + "aB3" * 11, "correct horse battery"


class Bomb:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


@pytest.fixture
def canary(tmp_path):
    """A file that is still missing at the end of the test."""
    place = tmp_path / "canary"
    yield place
    assert not place.exists(), "foreign code was executed"


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    """(a run that was saved after updates 1 and 2, written under umask 077; addresses that it tried to reach)."""
    place, tried = tmp_path_factory.mktemp("finished"), []
    file = place / "tiny.yaml"
    file.write_text(
        f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n{TINY}\n"
        "method: {name: data2vec2, top_k: 2, momentum: 0.5, decoder: {dim: 16, groups: 4, kernel: 3, layers: 2}}\n"
        "train: {steps: 2, global_batch: 8, device: cpu, log_every: 1}\nwatch: {samples: 20}\nsave: {every: 1}\n"
    )

    def connect(_, address):
        tried.append(address)
        raise OSError("no network here")

    before = os.umask(0o077)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "connect", connect)
            run = pretrain(Recipe.load(file, f"out={place / 'run'}"))
    finally:
        os.umask(before)
    return run, tried


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run as it was after its first update."""
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000002")
    return copy


def seal(step: Path) -> None:
    """Make a manifest that agrees with the files, as an attacker would."""
    files = {p.name: p.read_bytes() for p in step.iterdir() if p.name != checkpoint.MANIFEST}
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = {"format": checkpoint.FORMAT, "step": checkpoint.step_of(step), "files": entries}
    (step / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def call(capsys, *words: str) -> tuple[int, str]:
    """Exit status and all that was printed."""
    code = main(words)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out + printed.err


# Pickles ------------------------------------------------------------------------------------------------------------


def test_the_canary_is_real(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary"))).close()
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_t28_a_pickle_in_place_of_tensors_is_refused(name, run, canary, capsys):
    step = run / "checkpoints" / "step-00000001"
    (step / f"{name}.safetensors").write_bytes(pickle.dumps(Bomb(canary)))
    seal(step)
    code, told = call(capsys, "resume", str(run))
    assert code == 5
    assert "step-00000001" in told


def test_t28_other_files_of_a_checkpoint_are_never_opened(run, canary, capsys):
    step, bomb = run / "checkpoints" / "step-00000001", pickle.dumps(Bomb(canary))
    for place in (step, run, run / "checkpoints", run / "model"):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "state.pkl", ".metadata", "latest"):
            (place / name).write_bytes(bomb)
    (run / "checkpoints" / "checkpoint-3").mkdir()  # as transformers and DeepSpeed name theirs
    (run / "checkpoints" / "checkpoint-3" / "mp_rank_00_model_states.pt").write_bytes(bomb)
    seal(step)
    code, told = call(capsys, "resume", str(run))
    assert code == 0, told
    assert checkpoint.step_of(checkpoint.find(run / "checkpoints")[0]) == 2


@pytest.mark.parametrize("legacy", [True, False])
def test_t28_a_model_folder_with_a_pickle_that_holds_code_is_refused(legacy, tmp_path, canary):
    small_vit().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if legacy:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary)) + b" " * 1_000_000)
    else:
        torch.save({"a": torch.zeros(1_000_000), "b": Bomb(canary)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="cannot be loaded as a model"):
        load_encoder(tmp_path)


def test_weights_of_others_may_be_plain_pickles(tmp_path):
    model = small_vit()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    x = torch.ones(1, 3, 16, 16)
    torch.testing.assert_close(load_encoder(tmp_path)(x).last_hidden_state, model.eval()(x).last_hidden_state)


OPCODES = {  # ways in which a pickle calls or fills what it names
    "reduce": lambda canary: b"c__builtin__\nopen\n(V%s\nVw\ntR." % canary,
    "inst": lambda canary: b"(V%s\nVw\ni__builtin__\nopen\n." % canary,
    "obj": lambda canary: b"(c__builtin__\nopen\nV%s\nVw\no." % canary,
    "newobj": lambda canary: b"\x80\x04c__builtin__\nopen\n(V%s\nVw\nt\x81." % canary,
    "newobj_ex": lambda canary: b"\x80\x04c__builtin__\nopen\n(V%s\nVw\nt}\x92." % canary,
    "stack_global": lambda canary: b"\x80\x04\x8c\x08builtins\x8c\x04open\x93(V%s\nVw\ntR." % canary,
    "build": lambda canary: b"ccollections\nOrderedDict\n(tR}(V__class__\nc__builtin__\nopen\nub.",
    "call of a call": lambda canary: b"c__builtin__\ngetattr\n(c__builtin__\nopen\nV__call__\ntR(V%s\nVw\ntR." % canary,
    "extension": lambda canary: b"\x80\x02\x82\x01(V%s\nVw\ntR." % canary,
}


@pytest.mark.parametrize("name", OPCODES)
def test_a_published_checkpoint_calls_nothing_that_it_names(name, canary, tmp_path):
    with zipfile.ZipFile(file := tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", OPCODES[name](str(canary).encode()))
    with pytest.raises(RecipeError):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["model", "cfg", "cfg.model", "tensor", "key"])
def test_a_bomb_anywhere_in_a_published_checkpoint_is_only_a_record(place, canary, tmp_path):
    content = {"model": {"modality_encoders.IMAGE.extra_tokens": torch.zeros(1, 1, 8)}, "cfg": {"model": {"depth": 1}}}
    if place == "tensor":
        content["model"]["modality_encoders.IMAGE.local_encoder.proj.weight"] = Bomb(canary)
    elif place == "key":
        content["model"][Bomb(canary)] = torch.zeros(1)
    elif place == "cfg.model":
        content["cfg"]["model"] = Bomb(canary)
    else:
        content[place] = Bomb(canary)
    torch.save(content, tmp_path / "a.pt")
    code = main(["convert", str(tmp_path / "a.pt"), f"to={tmp_path / 'out'}"])
    assert code == 2


HOSTILE = {  # a tensor that a file describes: offset, shape, stride, numbers
    "beyond its numbers": (5, (2, 2), (2, 1), 8),
    "larger than its numbers": (0, (1 << 40,), (0,), 8),
    "negative": (-1, (2,), (1,), 8),
    "absurd": (0, (1 << 62, 1 << 62), (1, 1), 8),
    "of numbers that are not there": (0, (1 << 40,), (1,), 1 << 40),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_tensors_that_a_published_checkpoint_cannot_hold_are_refused(name, tmp_path):
    offset, shape, stride, count = HOSTILE[name]
    stored = ("storage", torch.FloatStorage, "0", "cpu", count)

    class Numbers:
        pass

    class Described:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Numbers(), offset, shape, stride, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, one):
            return stored if isinstance(one, Numbers) else None

    data = io.BytesIO()
    Pickler(data, 2).dump({"model": {"modality_encoders.IMAGE.extra_tokens": Described()}})
    with zipfile.ZipFile(file := tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data.getvalue())
        archive.writestr("archive/data/0", bytes(32))
    with pytest.raises(RecipeError, match="cannot be read as a file of torch"):
        convert(file, tmp_path / "out")


def test_published_checkpoints_that_are_bombs_loops_or_no_files_are_refused(tmp_path):
    for number, data in enumerate([b"", b"not a zip", pickle.dumps({"model": {}}), b"PK\x03\x04" + bytes(100)]):
        (file := tmp_path / f"{number}.pt").write_bytes(data)
        with pytest.raises(RecipeError, match="cannot be read as a file of torch"):
            convert(file, tmp_path / "out")
    with zipfile.ZipFile(file := tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1_000_000))
    with pytest.raises(RecipeError, match="is compressed, or larger"):
        convert(file, tmp_path / "out")
    loop: dict = {"model": {"modality_encoders.IMAGE.extra_tokens": torch.zeros(1)}}
    loop["cfg"] = {"model": {"_content": None}}
    loop["cfg"]["model"]["_content"] = loop["cfg"]["model"]
    torch.save(loop, file := tmp_path / "loop.pt")
    with pytest.raises(RecipeError, match="it lacks"):
        convert(file, tmp_path / "out")


def small_vit() -> ViTModel:
    return ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16))


# Calls that could run what a file says: name -> what makes one harmless.
DANGEROUS = {
    "eval": lambda call: False,
    "exec": lambda call: False,
    "system": lambda call: False,
    "popen": lambda call: False,
    "loads": lambda call: root_of(call) not in ("pickle", "marshal", "dill", "cloudpickle"),
    "load": lambda call: (
        root_of(call) not in ("pickle", "marshal", "torch", "np", "numpy", "joblib", "yaml")
        or keyword(call, "weights_only") is True
        or (root_of(call) == "yaml" and call_text(call).endswith("Loader=_Loader)"))
    ),
    "unsafe_load": lambda call: False,
    "full_load": lambda call: False,
    "extractall": lambda call: False,
    "unpack_archive": lambda call: False,
}


def root_of(call: ast.Call) -> str | None:
    return call.func.value.id if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) else None


def call_text(call: ast.Call) -> str:
    return ast.unparse(call)


def keyword(call: ast.Call, name: str):
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def dangerous(source: str) -> list[str]:
    """Calls of a source text that could run foreign code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", None)
        own = name == "eval" and method  # module.eval() is PyTorch's
        if (name in DANGEROUS and not own and not DANGEROUS[name](node)) or any(
            keyword(node, flag) for flag in ("shell", "allow_pickle", "trust_remote_code")
        ):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "line",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "pickle.loads(b)", "yaml.load(t, Loader=yaml.Loader)", "eval(x)",
     "np.load(p, allow_pickle=True)", "subprocess.run(c, shell=True)", "tar.extractall(p)", "f(p, trust_remote_code=True)"],
)  # fmt: skip
def test_a_dangerous_call_would_be_found(line):
    assert dangerous(line)


@pytest.mark.parametrize("package", ["mmssl", "modalities", "recipes", "tools"])
def test_no_call_could_run_what_a_file_says(package):
    sources = [*(ROOT / package).rglob("*.py")]
    assert sources
    assert not {str(p): calls for p in sources if (calls := dangerous(p.read_text("utf-8")))}


# Tensors ------------------------------------------------------------------------------------------------------------


def test_t30_no_mutated_tensor_file_crashes_or_is_taken_for_the_saved_one(tmp_path):
    saved = {"model": {"w": torch.arange(60.0).view(6, 10), "b": torch.ones(3, dtype=torch.int64)}}
    step = checkpoint.save(tmp_path, 1, saved, {}, keep=1)
    file, draw, outcomes = step / "model.safetensors", random.Random(0), []
    original, sound = file.read_bytes(), (step / checkpoint.MANIFEST).read_text()
    for _ in range(5000):
        broken = mutated(original, draw)
        file.write_bytes(broken)
        assert (checkpoint.problem(step) is None) == (broken == original)  # the hash tells
        seal(step)  # and with a hash that agrees, the format does
        try:
            loaded = checkpoint.load(step)[0]["model"]
        except CheckpointError:
            outcomes.append("refused")
        else:
            outcomes.append("same form" if form(loaded) == form(saved["model"]) else "other form")
            assert sum(t.numel() * t.element_size() for t in loaded.values()) <= len(broken)
        (step / checkpoint.MANIFEST).write_text(sound)
    assert outcomes.count("refused") > 1000


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, removed or added, most of them in the header."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(min(len(changed), draw.choice([8, 200, len(changed)])) or 1)
        match draw.choice(["flip", "set", "cut", "insert"]):
            case "flip":
                changed[place] ^= 1 << draw.randrange(8)
            case "set":
                changed[place] = draw.choice([0, 0x30, 0x39, 0x7F, 0xFF])
            case "cut":
                del changed[place : place + draw.choice([1, 1, 16, 1000])]
            case "insert":
                changed[place:place] = draw.choice([b"9", b"-", b'"', b"\0" * 8, b"[" * 1000])
        if not changed:
            break
    return bytes(changed)


def form(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_without_end_is_no_traceback(name, run, capsys):
    step = run / "checkpoints" / "step-00000001"
    (step / name).write_text('{"files": ' + "[" * 200_000)
    if name == "state.json":
        seal(step)
    assert call(capsys, "resume", str(run))[0] == 5
    (run / "status.json").write_text("[" * 200_000)
    assert call(capsys, "status", str(run))[0] == 2


# Remote code --------------------------------------------------------------------------------------------------------


@pytest.fixture
def evil(tmp_path, canary, monkeypatch):
    """A folder whose config, tokenizer and processor all point to code, and say that it is to be trusted."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether to run foreign code"))
    folder, points = tmp_path / "evil", {"AutoConfig": "code.C", "AutoModel": "code.C", "AutoTokenizer": ["code.C", "code.C"]}
    points |= {"AutoImageProcessor": "code.C", "AutoFeatureExtractor": "code.C"}
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')\nclass C: pass\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        facts = {"model_type": "stranger", "auto_map": points, "trust_remote_code": True, "tokenizer_class": "C"}
        (folder / name).write_text(json.dumps(facts))
    save_file({"w": torch.ones(1)}, folder / "model.safetensors")
    return folder


def test_t29_code_beside_a_model_is_not_run(evil):
    with pytest.raises(RecipeError, match="cannot be loaded as a model"):
        load_encoder(evil)


@pytest.mark.parametrize(
    ("recipe", "key", "words"),
    [
        ("vision/mae-demo", "model.init", ["train.global_batch=16"]),
        ("vision/simclr-cifar10-cpu", "model.init", ["model.backbone=resnet18"]),
        ("text/mlm-demo", "views.tokenizer", []),
    ],
)
def test_t29_no_key_of_a_recipe_runs_the_code_that_it_points_to(recipe, key, words, evil, image_folder, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Some words.")
    data = tmp_path / "texts" if recipe.startswith("text") else image_folder
    words = [f"data={data}", f"out={tmp_path / 'out'}", f"{key}={evil}", *words]
    code, told = call(capsys, "pretrain", recipe, *words)
    assert code == 2, told
    assert key in told


def test_t29_the_code_of_an_exported_model_is_ours_not_that_of_its_folder(finished, evil, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished[0] / "model", folder)
    shutil.copy(evil / "code.py", folder / "modeling_mmssl.py")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"trust_remote_code": True}))
    (folder / "preprocessor_config.json").write_text((evil / "preprocessor_config.json").read_text())
    load_encoder(folder)
    assert main(["probe", str(folder), f"data={tmp_path}"]) == 2  # nothing to probe there


def test_t29_a_config_within_a_config_has_no_say_either(evil, tmp_path):
    inner = {"model_type": "resnet", "auto_map": {"AutoModel": f"{evil}--code.C"}, "trust_remote_code": True}
    inner |= {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic", "_name_or_path": str(evil)}
    config = {"model_type": "mmssl", "modality": "vision", "hidden_size": 8, "backbone": inner}
    folder = tmp_path / "outer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.ones(100_000)}, folder / "model.safetensors")
    with contextlib.suppress(RecipeError):  # whether it can be loaded or not
        load_encoder(folder)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 2**40, "intermediate_size": 2**40},
        {"hidden_size": 2**17, "intermediate_size": 2**19},
        {"intermediate_size": 2**36},
        {"num_hidden_layers": 10**9},
        {"image_size": 2**30},
    ],
)
def test_t29_a_config_of_absurd_size_is_refused_before_memory_is(sizes, tmp_path):
    small_vit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    with pytest.raises(RecipeError, match="cannot be loaded as a model"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["model.trust_remote_code=true"],
        ["views.trust_remote_code=true"],
        ["trust_remote_code=true"],
        ["data.trust_remote_code=true"],
        ["model.backbone=resnet18", "model.options={trust_remote_code: true}"],
        ["model.backbone=resnet18", "model.options={auto_map: {AutoModel: code.C}}"],
    ],
)
def test_t29_no_recipe_can_allow_remote_code(words):
    with pytest.raises(RecipeError, match=r"trust_remote_code|auto_map"):
        Recipe.load("vision/simclr-cifar10-cpu", *words)


# Recipes ------------------------------------------------------------------------------------------------------------

TAGS = [
    "!!python/object/apply:builtins.open [{canary}, w]",
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:subprocess.Popen [['touch', '{canary}']]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!canary {canary}",
]


@pytest.mark.parametrize("tag", TAGS)
def test_z5_a_tag_of_python_is_refused_wherever_yaml_is_read(tag, canary, run, tmp_path, capsys):
    tag, recipe = tag.format(canary=canary), tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{path: x, modality: vision}}\nout: {tag}\n")
    assert call(capsys, "pretrain", str(recipe))[0] == 2
    assert call(capsys, "pretrain", "vision/mae-demo", f"out={tag}")[0] == 2
    with (run / "config.yaml").open("a") as file:
        file.write(f"out: {tag}\n")
    code, told = call(capsys, "resume", str(run))
    assert code == 2
    assert "not valid YAML" in told


def test_z10_a_secret_in_a_recipe_is_refused_with_the_place_for_it(capsys):
    for word in (f"hub_token={TOKEN}", f"train.wandb_api_key={TOKEN}", "data.password=hunter22"):
        code, told = call(capsys, "pretrain", "vision/mae-demo", word)
        assert code == 2
        assert "environment variable" in told
        assert TOKEN not in told


def test_no_shipped_recipe_trusts_or_names_a_secret():
    for name in shipped_recipes():
        text = find_recipe(name).read_text("utf-8")
        assert read_yaml(find_recipe(name)).get("data", {}).get("revision") or "trust_remote_code" not in text
        assert "!!" not in text


# Archives, paths, links ---------------------------------------------------------------------------------------------


def test_t32_archives_are_refused_and_nothing_is_unpacked(tmp_path, capsys):
    data, outside = tmp_path / "data", tmp_path / "outside"
    data.mkdir()
    with tarfile.open(data / "evil.tar", "w") as tar:
        for name in ("../outside", str(outside), "a/../../outside"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"out"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    with zipfile.ZipFile(data / "evil.zip", "w") as packed:
        packed.writestr("../outside", "out")
    before = sorted(tmp_path.rglob("*"))
    for path in (data, data / "evil.tar", data / "evil.zip"):
        code, told = call(capsys, "pretrain", "vision/mae-demo", f"data={path}", f"out={tmp_path / 'run'}")
        assert code == 2
        assert "holds nothing usable" in told
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "../../etc/hostname",
        "file:///etc/hostname",
        "ssh://host/file",
        "zip://a::file:///etc/hostname",
        "local://x",
    ],
)
def test_z7_a_row_of_the_hub_cannot_name_a_file_of_this_machine(name):
    source = Source([], "image")
    with pytest.raises(Rejected, match="no file of the Hub"):
        source.content({"image": {"bytes": None, "path": name}})


def test_z7_a_row_of_the_hub_may_name_a_file_that_was_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("mmssl.data.sources.source.HF_HUB_CACHE", str(tmp_path))
    source = Source([], "image")
    assert source.content({"image": {"bytes": None, "path": f"{tmp_path}/a.png"}}) == f"{tmp_path}/a.png"


def test_links_are_removed_and_what_they_lead_to_stays(finished, run, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    for name in (".tmp-step-00000009-ab", ".del-step-00000009-ab", "step-00000009"):
        (run / "checkpoints" / name).symlink_to(precious)
    shutil.rmtree(run / "report")
    for name in (".tmp-model-ab", ".del-model", "report"):
        (run / name).symlink_to(precious)
    (run / "log.txt").unlink()
    (run / "log.txt").symlink_to(precious / "file")
    tensors, state = checkpoint.load(run / "checkpoints" / "step-00000001")
    checkpoint.save(run / "checkpoints", 2, tensors, state, keep=1)  # rotates what is later away
    checkpoint.clean(run / "checkpoints")
    RunFolder.create(run, overwrite=True)
    assert (precious / "file").read_text() == "mine"
    assert [p.name for p in precious.iterdir()] == ["file"]
    assert not [p for p in run.rglob("*") if p.is_symlink() and not p.name.startswith(".")]


# What is left behind ------------------------------------------------------------------------------------------------


def test_z11_a_run_is_as_private_as_the_user_wants(finished):
    run, _ = finished
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (run, *run.rglob("*"))}
    assert len(modes) > 15
    assert not {p: oct(mode) for p, mode in modes.items() if mode & 0o077}


def test_a_run_calls_nobody(finished):
    assert finished[1] == []


def test_opening_a_table_calls_nobody(tmp_path, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load.get_session", lambda: tried.append("asked") or 1 / 0, raising=False)
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: tried.append(address) or 1 / 0)
    (tmp_path / "train.jsonl").write_text('{"image": "a.png"}\n')
    assert call(capsys, "pretrain", "vision/mae-demo", f"data={tmp_path}/train.jsonl", f"out={tmp_path}/run")[0] in (2, 3)
    assert tried == []


def test_t33_no_secret_is_in_anything_that_is_written_or_shown(image_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MY_PASSWORD", PASSWORD)
    data = tmp_path / f"data {PASSWORD}"
    shutil.copytree(image_folder, data)
    (data / "train" / "dark" / f"{TOKEN}.png").write_bytes(b"no image")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(
        f"data: {{path: {data}, modality: vision, workers: 1, max_bad: 1}}\n{TINY}\n"
        "method: {name: data2vec2, top_k: 2, momentum: 0.5, decoder: {dim: 16, groups: 4, kernel: 3, layers: 2}}\n"
        "train: {steps: 8, global_batch: 8, device: cpu, log_every: 1}\nwatch: {samples: 20}\n"
    )
    assert main(["pretrain", str(recipe), f"out={out}"]) == 0
    shown = capfd.readouterr()
    assert main(["pretrain", str(recipe), f"out={tmp_path / 'other'}", "data.max_bad=0", "data.min_bad=0"]) == 3
    assert main(["pretrain", str(recipe), f"optim.lr={TOKEN}", f"hub_token={TOKEN}", f"method.name={PASSWORD}"]) == 2
    assert main(["probe", f"https://user:{PASSWORD}@host/{TOKEN}", f"data={data}"]) == 2
    more = capfd.readouterr()
    assert "REDACTED" in more.err
    texts = {"shown": shown.out + shown.err + more.out + more.err}
    left = [p for where in (out, tmp_path / "other") for p in where.rglob("*") if p.is_file()]
    texts |= {str(p): p.read_text("utf-8", "replace") for p in left}
    assert "REDACTED" in (out / "quarantine.jsonl").read_text()
    assert not [name for name, text in texts.items() if TOKEN in text or PASSWORD in text]


def test_z10_the_ledger_of_bad_samples_holds_no_secret(tmp_path):
    quarantine = Quarantine(tmp_path / "bad.jsonl", 1, 0)
    quarantine.record(f"https://host/a.png?token={TOKEN}", "unreadable", f"Authorization: Bearer {TOKEN}")
    assert TOKEN not in (tmp_path / "bad.jsonl").read_text() + quarantine.message()


def test_what_a_run_writes_can_be_read_without_pickle(finished):
    run, _ = finished
    for path in (p for p in run.rglob("*") if p.is_file()):
        if path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix != ".png":
            path.read_text("utf-8")
