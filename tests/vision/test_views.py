import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.v2 import RandomResizedCrop

from mmssl.model.configuration import MmsslConfig
from mmssl.random import generator
from modalities.vision.features import PatchFeatures
from modalities.vision.processor import plain_views, processor
from modalities.vision.views import ImageViews, MaskOptions, crop_box, jittered

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


def test_colours_change_as_torchvision_changes_them_in_a_drawn_order():
    from torchvision.transforms import functional

    image, orders = picture(), set()
    kinds = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for key in range(20):
        found = jittered(0.4, generator("jitter", key))(image)
        draw = generator("jitter", key)
        factors = (0.6 + 0.8 * torch.rand(3, generator=draw, dtype=torch.float64)).tolist()
        order = torch.randperm(3, generator=draw).tolist()
        wanted = image
        for i in order:
            wanted = kinds[i](wanted, factors[i])
        assert np.abs(np.asarray(found, np.int16) - np.asarray(wanted, np.int16)).max() <= 1
        orders.add(tuple(order))
    assert len(orders) > 3


def test_without_jitter_nothing_more_is_drawn():
    one, other = (ImageViews(features(), jitter=strength) for strength in (0.0, 0.4))
    a, b = (views(picture(), lambda view: generator("same", view))["x"] for views in (one, other))
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match=r"^jitter: 1\.5"):
        ImageViews(features(), jitter=1.5)
