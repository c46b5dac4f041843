import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.v2 import RandomResizedCrop, functional

from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.random import generator
from mmssl.types import Batch, View
from modalities.vision import DEFAULTS
from modalities.vision.augment import Change, Crop, recoloured
from modalities.vision.features import PatchFeatures
from modalities.vision.pixels import cut_out, floats, gradients, read
from modalities.vision.processor import plain_views, processor
from modalities.vision.views import ImageViews, MaskOptions, crop_box, jitter

STEP = 1 / 255 / 0.224  # one of 256 levels, after normalisation


def features(size=32, patch=8, channels=3):
    return PatchFeatures(16, size, patch, channels)


def picture(width=48, height=48, seed=0, mode="RGB"):
    """Smooth colours plus noise: neither flat nor all alias."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / (5 + c) + c) * np.cos(y / (7 - c)) for c in range(3)]
    pixels = np.stack(waves, -1) + draw.normal(0, 10, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def drawn(*parts):
    return lambda view: generator(*parts, view)


# Crops


@pytest.mark.parametrize("size", [(480, 480), (640, 360), (100, 40)])
@pytest.mark.parametrize(("scale", "aspect"), [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.05, 0.3), (0.5, 2.0))])
def test_crops_are_distributed_as_those_of_torchvision(size, scale, aspect):
    count, source = 4000, generator("crops")
    ours = torch.tensor([crop_box(*size, scale, aspect, source) for _ in range(count)], dtype=torch.float64)
    image = torch.empty(3, size[1], size[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        boxes = [RandomResizedCrop.get_params(image, list(scale), list(aspect)) for _ in range(count)]
    theirs = torch.tensor([(left, top, width, height) for top, left, height, width in boxes], dtype=torch.float64)
    for boxes in (ours, theirs):
        left, top, width, height = boxes.unbind(1)
        assert bool((boxes[:, :2] >= 0).all())
        assert bool((boxes[:, 2:] >= 1).all())
        assert bool((left + width <= size[0]).all())
        assert bool((top + height <= size[1]).all())

    def facts(boxes):
        left, top, width, height = boxes.unbind(1)
        area, shape = width * height / (size[0] * size[1]), (width / height).log()
        places = left + width / 2, top + height / 2
        return torch.stack([area, area.square(), shape, shape.square(), area * shape, *places, places[0] ** 2, places[1] ** 2])

    one, other = facts(ours), facts(theirs)
    error = ((one.var(1) + other.var(1)) / count).sqrt()
    assert bool(((one.mean(1) - other.mean(1)).abs() < 4 * error + 1e-9).all())


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000), (30, 30)])
def test_a_box_that_never_fits_becomes_the_largest_centred_one_as_in_torchvision(size):
    scale, aspect = (1.0, 1.0), (1.1, 1.3)
    left, top, width, height = crop_box(*size, scale, aspect, generator("never"))
    theirs = RandomResizedCrop.get_params(torch.empty(3, size[1], size[0]), list(scale), list(aspect))
    assert (top, left, height, width) == tuple(theirs)


def test_a_single_pixel_can_be_cropped():
    assert crop_box(1, 1, (0.2, 1.0), (3 / 4, 4 / 3), generator(0)) == (0, 0, 1, 1)
    assert ImageViews(features())(Image.new("RGB", (1, 1)), drawn(0))["x"].shape == (3, 32, 32)


# Views


def test_a_view_is_the_box_resized_flipped_and_normalised():
    image, views = picture(60, 40), ImageViews(features(), flip=1.0)
    box = crop_box(60, 40, (0.2, 1.0), (3 / 4, 4 / 3), generator(3, 0))
    cut = image.crop((box[0], box[1], box[0] + box[2], box[1] + box[3]))
    pixels = np.asarray(cut.resize((32, 32), Image.Resampling.BICUBIC), np.float64)[:, ::-1] / 255
    wanted = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    found, inside = views(image, drawn(3))["x"].double(), slice(3, -3)  # at the edge the filter sees beyond the box
    wanted = torch.from_numpy(wanted.transpose(2, 0, 1).copy())
    assert_close(found[:, inside, inside], wanted[:, inside, inside], rtol=0, atol=1e-5)


def test_a_view_depends_on_its_key_alone():
    image, views = picture(), ImageViews(features(), mask=MaskOptions(ratio=0.5, adjust=0.1, width=2, copies=3))
    one, same, other = views(image, drawn(1)), views(image, drawn(1)), views(image, drawn(2))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = views(image, drawn(1))
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("x", "hidden"):
        assert torch.equal(one[name], same[name])
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])


def test_half_of_the_views_are_flipped_and_flipping_mirrors():
    image = picture()
    straight, mirrored, half = (ImageViews(features(), flip=p) for p in (0.0, 1.0, 0.5))
    flips = 0
    for i in range(400):
        a, b, c = (views(image, drawn(i))["x"] for views in (straight, mirrored, half))
        assert torch.equal(a.flip(-1), b)
        assert torch.equal(c, a) or torch.equal(c, b)
        flips += int(torch.equal(c, b))
    assert abs(flips - 200) < 40  # 4 standard deviations


def test_whole_area_and_square_aspect_make_the_plain_view():
    image = picture()
    views = ImageViews(features(), scale=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0)
    assert torch.equal(views(image, drawn(0))["x"], views.plain([image]).x[0])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_and_colour_go_in_and_out(mode):
    image = picture(mode=mode)
    colour = ImageViews(features()).plain([image, image]).x
    grey = ImageViews(features(channels=1), mean=(0.5,), std=(0.25,)).plain([image]).x
    assert (colour.shape, grey.shape) == ((2, 3, 32, 32), (1, 1, 32, 32))
    wanted = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255
    assert_close(grey[0, 0], torch.from_numpy((wanted - 0.5) / 0.25), rtol=0, atol=1e-5)
    if mode == "L":
        pixels = (
            colour[0] * torch.tensor([0.229, 0.224, 0.225])[:, None, None] + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        )
        assert_close(pixels[0], pixels[1], rtol=0, atol=1e-5)
        assert_close(pixels[0], torch.from_numpy(wanted), rtol=0, atol=1e-5)


def test_one_mean_serves_all_channels():
    view = ImageViews(features(), mean=(0.5,), std=(0.5,)).plain([Image.new("RGB", (9, 9), (0, 255, 51))]).x
    assert_close(view[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]), rtol=0, atol=1e-6)


def test_collating_keeps_samples_in_order_and_their_masks_adjacent():
    views = ImageViews(features(), mask=MaskOptions(ratio=0.5, adjust=0.1, width=2, copies=3))
    samples = [views(picture(seed=i), drawn(i)) for i in range(4)]
    (view,) = views.collate(samples)
    assert (view.modality, view.copies, view.x.shape) == ("vision", 3, (4, 3, 32, 32))
    for i, sample in enumerate(samples):
        assert torch.equal(view.x[i], sample["x"])
        assert torch.equal(view.mask.hidden[3 * i : 3 * i + 3], sample["hidden"])
    assert ImageViews(features()).collate([{"x": samples[0]["x"]}])[0].mask is None


# Several crops


def levels(x, size):
    """A normalised view from 0 to 255."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert x.shape == (3, size, size)
    return (x * std + mean) * 255


SMALL = Crop(2, 16, scale=(0.05, 0.3))


def test_one_view_for_each_crop_full_size_first():
    views = ImageViews(features(), crops=[SMALL, Crop(1, grey=1.0), Crop(1, 32, grey=0.0)])
    assert (views.count, views.crops) == (2, 2)
    found = views.collate([views(picture(seed=i), drawn(i)) for i in range(3)])
    assert [tuple(view.x.shape) for view in found] == [(3, 3, 32, 32)] * 2 + [(3, 3, 16, 16)] * 2
    assert [view.record["grey"].tolist() for view in found] == [[1.0] * 3] + [[0.0] * 3] * 3
    for view in found:
        assert (view.modality, view.mask) == ("vision", None)
        shapes = {name: tuple(t.shape) for name, t in view.record.items()}
        assert shapes == {"box": (3, 4), "colour": (3, 4), "sequence": (3, 4), "cutout": (3, 3)} | dict.fromkeys(
            ("flip", "grey", "blur", "solarize", "rotation", "noise", "sobel"), (3,)
        )
    there_and_back = Batch.from_tensors(Batch(found, torch.arange(3)).tensors()).views
    for one, other in zip(found, there_and_back, strict=True):
        assert torch.equal(one.x, other.x)
        assert all(torch.equal(one.record[name], other.record[name]) for name in one.record)


def test_more_than_ten_views_stay_in_order():
    views = ImageViews(features(), crops=[Crop(12, flip=0.0)])
    sample = views(picture(), drawn(0))
    for i, view in enumerate(views.collate([sample])):
        assert torch.equal(view.x[0], sample[f"{i}.x"])
        assert torch.equal(view.record["box"][0], sample[f"{i}.record"][:4])


@pytest.mark.parametrize("policy", ["simclr", "moco1", "mocov3", "dino"])
def test_a_view_of_a_policy_is_what_its_record_says(policy):
    image, views = picture(70, 50), ImageViews(features(), crops=policy)
    blurred = 0
    for key in range(10):
        for view, crop in zip(views.collate([views(image, drawn(policy, key))]), views.kinds, strict=True):
            record = {name: t[0].tolist() for name, t in view.record.items()}
            left, top, width, height = (round(v * side, 3) for v, side in zip(record["box"], (70, 50, 70, 50)))
            assert all(v.is_integer() for v in (left, top, width, height))
            area = width * height / (70 * 50)
            assert 0.9 * crop.scale[0] - 0.01 < area < 1.1 * crop.scale[1]
            cut = functional.crop(image, int(top), int(left), int(height), int(width))
            mode = functional.InterpolationMode(crop.interpolation)
            wanted = functional.resize(cut, [crop.size, crop.size], mode)
            exact = functional.pil_to_tensor(wanted).float()
            change = Change(
                bool(record["flip"]),
                tuple(record["colour"]),
                tuple(int(i) for i in record["sequence"]),
                bool(record["grey"]),
                record["blur"],
                bool(record["solarize"]),
            )
            difference = (levels(view.x[0], crop.size) - change.applied(exact, crop.order)).abs()
            assert float(difference.max()) < 8  # the crop is rounded to another of two levels here and there, then recoloured
            assert float(difference.mean()) < 1
            blurred += record["blur"] > 0
    assert (blurred > 0) == (policy != "moco1")


def test_views_depend_on_their_own_key_alone():
    image, views = picture(), ImageViews(features(), crops=[Crop(2), SMALL])
    one = views(image, lambda view: generator("a", view))
    other = views(image, lambda view: generator("b" if view == 1 else "a", view))
    for name, tensor in one.items():
        changed = not torch.equal(tensor, other[name])
        assert not changed or name.startswith("1.")
    assert not torch.equal(one["1.x"], other["1.x"])
    assert not torch.equal(one["0.x"], one["1.x"])
    assert not torch.equal(one["0.record"][:4], one["1.record"][:4])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = views(image, lambda view: generator("a", view))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_crops_do_not_move_when_a_chance_is_changed():
    image = picture()
    bare, full = (
        ImageViews(features(), crops=[Crop(2, jitter=jitter, grey=p, blur=p, solarize=p), SMALL])
        for jitter, p in (((0.0,) * 4, 0.0), ((0.4, 0.4, 0.4, 0.1), 1.0))
    )
    one, other = bare(image, drawn(0)), full(image, drawn(0))
    for i in range(4):
        (mine,), (others,) = (views.collate([sample])[i : i + 1] for views, sample in ((bare, one), (full, other)))
        assert torch.equal(mine.record["box"], others.record["box"])
        assert torch.equal(mine.record["flip"], others.record["flip"])
        assert torch.equal(one[f"{i}.x"], other[f"{i}.x"]) == (i >= 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_rotation_cutout_sobel_and_noise_change_the_view_that_would_be_there_without_them(channels):
    mask, image = MaskOptions(ratio=0.5, adjust=0.1, width=2, copies=3), picture()

    def view(key, **options):
        crops, normal = [Crop(1, jitter=(0.4, 0.4, 0.4, 0.1), **options)], {"mean": (0.5,), "std": (0.25,)}
        views = ImageViews(features(channels=channels), crops=crops, mask=mask, **normal)
        return views.collate([views(image, drawn(key))])[0]

    seen = set()
    for key in range(12):
        bare = view(key)
        turned, holed, edges, rough = (view(key, **{name: 1.0}) for name in ("rotate", "cutout", "sobel", "noise"))
        quarters = int(turned.record["rotation"][0])
        assert torch.equal(turned.x, bare.x.rot90(quarters, (2, 3)))
        assert torch.equal(holed.x[0], cut_out(bare.x[0], *holed.record["cutout"][0].tolist()))
        assert torch.equal(edges.x[0], gradients(bare.x[0]))
        apart = rough.x - bare.x
        assert 0.15 < float(apart.std()) < 0.45  # 0.1 of the range is 0.4 after normalisation, less where it is cut off
        assert float(rough.record["noise"]) == pytest.approx(0.1)
        for other in (turned, holed, edges, rough):
            assert torch.equal(other.mask.hidden, bare.mask.hidden)
            for name in ("box", "flip", "colour", "sequence", "grey", "blur", "solarize"):
                assert torch.equal(other.record[name], bare.record[name])
        assert [float(bare.record[name].abs().sum()) for name in ("rotation", "noise", "cutout", "sobel")] == [0.0] * 4
        seen.add(quarters)
    assert seen == {1, 2, 3}


EVERYTHING = Crop(2, jitter=(0.8, 0.8, 0.8, 0.2), grey=0.3, blur=0.7, solarize=0.3, rotate=0.6, cutout=0.5, sobel=0.3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crops", ["simclr", "moco1", "byol", "dino", [EVERYTHING]])
def test_a_batch_changed_on_the_device_is_what_workers_make_of_each_image(crops, channels):
    images = [picture(60, 50, seed) for seed in range(12)]
    made = []
    for on_device in (False, True):
        views = ImageViews(features(channels=channels), crops=crops, mean=(0.4,), std=(0.2,), on_device=on_device)
        samples = [views(image, drawn("device", i)) for i, image in enumerate(images)]
        assert samples[0]["0.x"].dtype == (torch.uint8 if on_device else torch.float32)
        made.append(views.finish(views.collate(samples)))
        plain = [views.plain(images)]
        assert views.finish(plain)[0] is plain[0]
    assert len(made[0]) == len(made[1])
    for one, other in zip(*made):
        assert one.record.keys() == other.record.keys()
        assert_close(other.x, one.x, rtol=0, atol=2e-4)
        assert float((one.x - other.x.flip(0)).abs().mean()) > 0.1


def test_what_a_batch_is_changed_by_is_in_full_precision_under_autocast():
    views = ImageViews(features(), crops=[EVERYTHING], on_device=True)
    batch = views.collate([views(picture(seed=seed), drawn("autocast", seed)) for seed in range(4)])
    with torch.autocast("cpu", torch.bfloat16):
        found = views.finish(batch)
    for one, other in zip(found, views.finish(batch), strict=True):
        assert torch.equal(one.x, other.x)


def test_boxes_are_distributed_as_the_kind_of_crop_says():
    image = picture(200, 160)
    views = ImageViews(features(), crops=[Crop(2, scale=(0.4, 1.0)), Crop(3, 16, scale=(0.05, 0.14))])
    found = views.collate([views(image, drawn(i)) for i in range(100)])
    for i, view in enumerate(found):
        box = view.record["box"]
        area = box[:, 2] * box[:, 3]
        low, high = (0.4, 1.0) if i < 2 else (0.05, 0.14)
        assert bool(((area > low * 0.95) & (area < high * 1.05)).all())
        assert bool((box[:, :2] + box[:, 2:] <= 1 + 1e-6).all())
        assert float(area.std()) > (high - low) / 8


def test_masks_are_those_of_the_full_size_views():
    mask = MaskOptions(ratio=0.5, adjust=0.1, width=2, copies=3)
    views = ImageViews(features(), crops=[Crop(2), SMALL], mask=mask)
    samples = [views(picture(seed=i), drawn(i)) for i in range(4)]
    found = views.collate(samples)
    assert [view.mask is not None for view in found] == [True, True, False, False]
    for v in range(2):
        assert found[v].copies == 3
        for i, sample in enumerate(samples):
            assert torch.equal(found[v].mask.hidden[3 * i : 3 * i + 3], sample[f"{v}.hidden"])
    assert not torch.equal(found[0].mask.hidden, found[1].mask.hidden)


def test_grey_models_take_policies_too():
    views = ImageViews(features(channels=1), mean=(0.5,), std=(0.25,), crops="byol")
    found = views.collate([views(picture(), drawn(0))])
    assert [tuple(view.x.shape) for view in found] == [(1, 1, 32, 32)] * 2


def test_the_plain_view_does_not_depend_on_the_crops():
    image = picture(50, 40)
    assert torch.equal(ImageViews(features(), crops="dino").plain([image]).x, ImageViews(features()).plain([image]).x)


def test_each_method_begins_with_the_views_it_takes():
    multi, single = {"swav", "deepcluster_v2", "sela_v2", "dino", "ibot", "msn"}, {"deepcluster", "instance_discrimination"}
    seen = set()
    for method, blocks in DEFAULTS.items():
        if "crops" in blocks.get("views", {}):
            given = dict(blocks["views"])  # as YAML has it; the recipe makes options of it
            if "mask" in given:
                given["mask"] = MaskOptions(**given["mask"])
            if isinstance(given["crops"], list):
                given["crops"] = [Crop(**crop) for crop in given["crops"]]
            views = ImageViews(features(size=224, patch=16), **given)
            assert views.count == (1 if method in single else 2)
            assert (views.crops > 0) == (method in multi)
            seen.add(method)
    others = {"simclr", "simclr_v2", "moco_v1", "moco_v2", "moco_v3", "byol", "simsiam", "barlow_twins", "vicreg"}
    others |= {"sit", "aasae"}
    assert seen == multi | single | others


@torch.no_grad()
def test_an_encoder_reads_smaller_crops_by_their_place_in_the_grid():
    torch.manual_seed(0)
    config = MmsslConfig(modality="vision", hidden_size=16, depth=2, heads=2, image_size=32, patch_size=8)
    encoder = Encoder.from_config(config).eval()
    x = torch.randn(2, 3, 16, 16)
    features = encoder.features.proj(x).flatten(2).transpose(1, 2)  # (2, 4, 16)
    table = []
    for row in (0.5, 2.5):  # two patches over a grid of four
        for column in (0.5, 2.5):
            angles = [[place * 10000 ** (-i / 4) for i in range(4)] for place in (column, row)]
            table.append([f(a) for half in angles for f in (math.sin, math.cos) for a in half])
    wanted = encoder.transformer(features + torch.tensor(table), None, None)[0]
    found = encoder(View(x, "vision"))
    assert_close(found.tokens, wanted[:, encoder.transformer.extra_tokens :], rtol=1e-5, atol=1e-6)
    assert encoder(View(torch.randn(2, 3, 32, 32), "vision")).tokens.shape == (2, 16, 16)


@pytest.mark.parametrize("size", [(16, 20), (20, 20), (16, 32)])
def test_an_image_that_is_no_square_of_patches_is_refused(size):
    with pytest.raises(ValueError, match=rf"^image_size: an image of {size[0]} x {size[1]} pixels"):
        features()(torch.zeros(1, 3, *size))


# Export


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [32, 50, 90, 17])
def test_the_exported_processor_does_what_the_plain_view_does(side, channels):
    mean, std = ((0.5,), (0.25,)) if channels == 1 else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    views = ImageViews(features(channels=channels), mean=mean, std=std)
    exported = processor(MmsslConfig(image_size=32, channels=channels), views)
    images = [picture(side, side, seed, "L" if channels == 1 else "RGB") for seed in range(3)]
    theirs, ours = torch.as_tensor(np.stack(exported(images)["pixel_values"])), views.plain(images).x
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 1.01 * STEP  # resizing may round to the other of two levels
    assert (theirs - ours).abs().mean() < 1e-2


def test_views_of_a_saved_model_are_those_it_was_trained_with(tmp_path):
    views = ImageViews(features(), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    processor(MmsslConfig(image_size=32, channels=3), views).save_pretrained(tmp_path)
    model = SimpleNamespace(config=SimpleNamespace(image_size=32, channels=3))
    image = picture()
    assert_close(plain_views(model, tmp_path).plain([image]).x, views.plain([image]).x, rtol=0, atol=1e-6)
    assert plain_views(model, tmp_path).scale == (0.08, 1.0)  # of linear protocols, torchvision's default
    assert plain_views(model, tmp_path / "nothing").mean.tolist() == pytest.approx([255 * m for m in (0.485, 0.456, 0.406)])


# Options


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"scale": (math.nan, 1.0)}, "scale"),
        ({"aspect": (0.0, 1.0)}, "aspect"),
        ({"aspect": (2.0, 1.0)}, "aspect"),
        ({"flip": 1.5}, "flip"),
        ({"flip": math.nan}, "flip"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": (0.5, 0.5)}, "mean, std"),
        ({"std": (0.5, 0.0, 0.5)}, "mean, std"),
        ({"mask": MaskOptions(ratio=0.99)}, "mask.ratio"),
        ({"mask": MaskOptions(ratio=0.0)}, "mask.ratio"),
        ({"mask": MaskOptions(ratio=1.5)}, "mask.ratio"),
        ({"mask": MaskOptions(copies=0)}, "mask"),
        ({"mask": MaskOptions(width=0)}, "mask"),
        ({"mask": MaskOptions(width=5)}, "mask"),
    ],
)
def test_a_bad_option_is_refused_by_its_name(options, name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        ImageViews(features(), **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"crops": "simlcr"}, r"crops: 'simlcr' is no known policy \(did you mean simclr\?\)"),
        ({"crops": []}, "crops: at least one must be of full size, model.image_size=32"),
        ({"crops": [SMALL]}, "crops: at least one must be of full size, model.image_size=32"),
        ({"crops": [Crop(2), Crop(2, 20)]}, r"crops\.1\.size: 20 pixels"),
        ({"crops": [Crop(2), Crop(2, 64)]}, r"crops\.1\.size: 64 pixels"),
        ({"crops": [Crop(blur=2.0)]}, r"crops\.0\.blur: 2\.0, must be a probability"),
        ({"crops": [Crop(), Crop(rotate=1.5)]}, r"crops\.1\.rotate: 1\.5, must be a probability"),
        ({"crops": "simclr", "flip": 0.0}, "scale, aspect, flip, jitter: each of the crops has its own"),
        ({"crops": "simclr", "jitter": 0.4}, "scale, aspect, flip, jitter: each of the crops has its own"),
        ({"crops": "simclr", "scale": [0.1, 1.0]}, "scale, aspect, flip, jitter: each of the crops has its own"),
        ({"on_device": True}, "on_device: changes crops of views.crops, and there are none"),
        ({"on_device": True, "crops": [Crop(), Crop(noise=0.1)]}, "on_device: noise of crops is drawn in workers"),
    ],
)
def test_bad_crops_are_refused(options, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        ImageViews(features(), **options)


def test_crops_smaller_than_two_patches_or_with_relative_positions_are_refused():
    with pytest.raises(ValueError, match=r"^crops\.1\.size: 0 pixels, .* model\.image_size=32, in whole patches of 32"):
        ImageViews(features(patch=32), crops="swav")
    relative = PatchFeatures(16, 32, 8, positions="relative")
    assert ImageViews(relative, crops="byol").count == 2
    with pytest.raises(ValueError, match=r"^crops: relative positions know one size of image"):
        ImageViews(relative, crops="dino")


def test_colours_change_as_torchvision_changes_them_in_a_drawn_order():
    image, orders = picture(), set()
    kinds = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for key in range(20):
        found = recoloured(floats(read(image)), *jitter(0.4, generator("jitter", key)))
        draw = generator("jitter", key)
        factors = (0.6 + 0.8 * torch.rand(3, generator=draw, dtype=torch.float64)).tolist()
        order = torch.randperm(3, generator=draw).tolist()
        wanted = functional.pil_to_tensor(image).double() / 255
        for i in order:
            wanted = kinds[i](wanted, factors[i])
        assert_close(found.double(), 255 * wanted, rtol=0, atol=0.1)
        orders.add(tuple(order))
    assert len(orders) > 3


def test_without_jitter_nothing_more_is_drawn():
    one, other = (ImageViews(features(), jitter=strength) for strength in (0.0, 0.4))
    a, b = (views(picture(), lambda view: generator("same", view))["x"] for views in (one, other))
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match=r"^jitter: 1\.5"):
        ImageViews(features(), jitter=1.5)
