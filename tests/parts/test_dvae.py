"""Codes of a discrete autoencoder: what they say of images, on how many ranks they are learned, and that they stay."""

import shutil

import pytest
import torch
from torch.testing import assert_close

from mmssl.config import Recipe
from mmssl.errors import RecipeError
from mmssl.parts.tokenizer import AutoencoderTokenizer, TokenizerOptions
from mmssl.random import generator
from mmssl.training import checkpoint
from mmssl.training.pretrain import pretrain
from mmssl.types import Clock
from tests.ranks import on_two_ranks

GRID, VALUES = (4, 4), 12
OPTIONS = {"kind": "dvae", "codes": 16, "width": 16, "batch": 16}


def images(count=40):
    """(count, 16, 12): each patch is one of four, with noise."""
    draw = generator("images")
    four = torch.randn(4, VALUES, generator=draw, dtype=torch.float64)
    which = torch.randint(4, (count, 16), generator=draw)
    return four[which] + 0.1 * torch.randn(count, 16, VALUES, generator=draw, dtype=torch.float64)


def tokenizer(updates, **options):
    torch.manual_seed(0)
    made = AutoencoderTokenizer(VALUES, TokenizerOptions(**OPTIONS | {"updates": updates} | options), GRID).double()
    made.attach(40, 16, 0)
    return made


def test_codes_say_more_of_an_image_than_the_mean_image_does():
    learned, x = tokenizer(300), images()
    assert learned.health(Clock()) == {"code_error": 1.0}
    learned.fit(learned.sample(x))
    codes = learned(x)
    assert codes.shape == (40, 16)
    left = (learned.decode(codes) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert float(left) < 0.5
    assert learned.health(Clock())["code_error"] == pytest.approx(float(left))
    assert torch.equal(learned(x[7:9]), codes[7:9])
    assert not [*learned.parameters()]
    same = tokenizer(1)
    same.load_state_dict(learned.state_dict())
    assert torch.equal(same(x), codes)


def fitted(rank):
    learned = tokenizer(4)
    learned.fit(learned.sample(images()))
    return learned.state_dict()


def test_two_ranks_learn_what_one_process_learns(tmp_path):
    alone, ranks = fitted(0), on_two_ranks(fitted, folder=tmp_path)
    before = tokenizer(4).state_dict()
    for name, tensor in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert_close(ranks[0][name], tensor, rtol=1e-7, atol=1e-9)
        assert not torch.equal(before[name], tensor)


def test_images_that_take_too_much_memory_are_refused():
    with pytest.raises(
        ValueError,
        match=r"tokenizer\.memory: 1 GiB, the 2000000 images take 1\.43 GiB; raise it, .*data\.limit.*tokenizer\.kind=kmeans",
    ):
        tokenizer(1, memory=1.0).attach(2_000_000, 16, 0)


@pytest.mark.parametrize(
    ("name", "more", "text"),
    [
        ("beit", "{kind: dvae, updates: 0}", r"method\.tokenizer: width, updates and batch must be at least 1"),
        ("cae", "{kind: dvae, kl: -1}", r"method\.tokenizer: .*kl at least 0"),
        ("splitmask", "{kind: vqgan}", r"method\.tokenizer\.kind: found 'vqgan'"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(name, more, text):
    with pytest.raises(RecipeError, match=text):
        Recipe.load(f"vision/{name}-demo", f"method.tokenizer={more}")


def test_beit_learns_from_them_draws_them_and_resumes_with_the_same(image_folder, tmp_path):
    path, out, again = tmp_path / "beit.yaml", tmp_path / "run", tmp_path / "again"
    path.write_text(
        f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
        "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 1, heads: 2}\n"
        "method: {name: beit, tokenizer: {kind: dvae, codes: 8, width: 8, updates: 5, batch: 8}}\n"
        "views: {mask: {smallest: 1}}\n"
        "train: {steps: 4, global_batch: 8, device: cpu, log_every: 1}\n"
        "watch: {samples: 20, every: 4}\n"
        "save: {every: 2, keep: 2}\n"
    )
    pretrain(Recipe.load(path, f"out={out}"))
    assert (out / "report" / "rebuilt-0000004.png").is_file()
    assert "health/code_error" in (out / "metrics.jsonl").read_text()
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    pretrain(Recipe.load(again / "config.yaml", f"out={again}"), resume=True)
    mine, theirs = (checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0]["model"] for run in (again, out))
    assert any(".tokenizer.net.encoder" in name for name in theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
