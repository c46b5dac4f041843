from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.testing import assert_close
from torchvision.transforms.v2 import functional

from mmssl.random import generator
from modalities.vision.augment import FLIP_FIRST, POLICIES, Change, Crop, check_crop, hue_turned, policy, recoloured


def picture(size=40, seed=0):
    """Waves of colour with noise: every hue, dark and bright."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size]
    waves = [127 + 110 * np.sin(x / (3 + c) + 2 * c) * np.cos(y / (6 - c) + c) for c in range(3)]
    return Image.fromarray((np.stack(waves, -1) + draw.normal(0, 12, (size, size, 3))).clip(0, 255).astype(np.uint8))


def pixels(image):
    return np.asarray(image, np.int16)


# Operations


@pytest.mark.parametrize("factor", [0.2, 0.75, 1.0, 1.3, 1.8])
def test_each_factor_changes_what_torchvision_changes(factor):
    image = picture()
    kinds = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for i, wanted in enumerate(kinds):
        colour = [1.0, 1.0, 1.0, 0.0]
        colour[i] = factor
        assert np.array_equal(pixels(recoloured(image, colour, (0, 1, 2, 3))), pixels(wanted(image, factor)))


@pytest.mark.parametrize("turns", [-0.5, -0.2, -0.003, 0.1, 0.37, 0.5])
def test_hue_turns_as_in_torchvision(turns):
    image = picture()
    assert np.array_equal(pixels(hue_turned(image, turns)), pixels(functional.adjust_hue(image, turns)))


def test_colours_are_changed_in_the_sequence_drawn():
    image, colour = picture(), (1.4, 0.6, 1.5, 0.15)
    kinds = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)
    found = set()
    for sequence in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        wanted = image
        for i in sequence:
            wanted = kinds[i](wanted, colour[i])
        one = recoloured(image, colour, sequence)
        assert np.array_equal(pixels(one), pixels(wanted))
        found.add(one.tobytes())
    assert len(found) == 3


def test_an_unchanged_colour_costs_nothing():
    image = picture()
    assert recoloured(image, (1.0, 1.0, 1.0, 0.0), (3, 2, 1, 0)) is image
    assert Change().applied(image) is image


def test_grey_solarize_and_flip_are_those_of_torchvision():
    image = picture()
    for change, wanted in (
        (Change(grey=True), functional.rgb_to_grayscale(image, 3)),
        (Change(solarize=True), functional.solarize(image, 128)),
        (Change(flip=True), functional.horizontal_flip(image)),
    ):
        found = change.applied(image)
        assert (found.mode, found.size) == ("RGB", image.size)
        assert np.array_equal(pixels(found), pixels(wanted))
    bands = pixels(Change(solarize=True).applied(Image.frombytes("L", (256, 1), bytes(range(256)))))[0]
    assert bands.tolist() == [*range(128), *range(127, -1, -1)]


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_gaussian_with_that_sigma(sigma):
    image, inside = picture(), (slice(8, -8), slice(8, -8))
    found = pixels(Change(blur=sigma).applied(image))[inside]
    assert np.array_equal(found, pixels(image.filter(ImageFilter.GaussianBlur(sigma)))[inside])
    exact = functional.gaussian_blur(functional.pil_to_tensor(image).double(), [23, 23], [sigma, sigma])
    exact = exact.permute(1, 2, 0).numpy()[inside]
    assert np.abs(found - exact).max() < 5
    assert np.abs(found - exact).mean() < 0.8
    if sigma > 0.4:
        unblurred = np.abs(pixels(image)[inside] - exact).mean()
        assert np.abs(found - exact).mean() < 0.2 * unblurred


def test_steps_come_in_the_order_of_the_policy():
    image, change = picture(), Change(True, (1.3, 0.8, 1.2, 0.1), (2, 0, 3, 1), True, 1.5, True)
    steps = {
        "flip": Change(flip=True),
        "jitter": Change(colour=change.colour, sequence=change.sequence),
        "grey": Change(grey=True),
        "blur": Change(blur=1.5),
        "solarize": Change(solarize=True),
    }
    results = set()
    for order in (FLIP_FIRST, ("grey", "jitter", "blur", "solarize", "flip"), ("solarize", "blur", "jitter", "grey", "flip")):
        wanted = image
        for step in order:
            wanted = steps[step].applied(wanted)
        found = change.applied(image, order)
        assert np.array_equal(pixels(found), pixels(wanted))
        results.add(found.tobytes())
    assert len(results) == 3


def test_a_grey_image_is_changed_too():
    image = picture().convert("L")
    found = Change(True, (1.2, 0.7, 1.4, 0.2), (0, 1, 2, 3), True, 1.0, True).applied(image)
    wanted = functional.adjust_contrast(functional.adjust_brightness(functional.horizontal_flip(image), 1.2), 0.7)
    wanted = functional.solarize(wanted.filter(ImageFilter.GaussianBlur(1.0)), 128)
    assert found.mode == "L"
    assert np.array_equal(pixels(found), pixels(wanted))


# Draws


def test_chances_and_ranges_of_the_draws():
    crop = Crop(
        flip=0.5, jitter=(0.4, 0.8, 1.5, 0.1), jitter_chance=0.8, grey=0.2, blur=0.5, blur_sigma=(0.3, 2.0), solarize=0.1
    )
    source, count = generator("chances"), 2000
    drawn = [Change.drawn(crop, source) for _ in range(count)]
    facts = torch.tensor([[d.flip, d.colour != (1, 1, 1, 0), d.grey, d.blur > 0, d.solarize] for d in drawn]).double()
    chances = torch.tensor([0.5, 0.8, 0.2, 0.5, 0.1]).double()
    assert bool(((facts.mean(0) - chances).abs() < 4 * (chances * (1 - chances) / count).sqrt()).all())
    together = torch.corrcoef(facts.T) - torch.eye(5)
    assert float(together.abs().max()) < 4 / count**0.5

    def uniform(values, low, high):
        values = (torch.tensor(values, dtype=torch.float64) - low) / (high - low)
        assert 0 <= float(values.min()) <= float(values.max()) <= 1
        ideal = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
        assert float((values.sort().values - ideal).abs().max()) < 1.95 / len(values) ** 0.5  # Kolmogorov, 1 in 1000

    colours = [d.colour for d in drawn if d.colour != (1, 1, 1, 0)]
    for i, (low, high) in enumerate([(0.6, 1.4), (0.2, 1.8), (0.0, 2.5), (-0.1, 0.1)]):
        uniform([colour[i] for colour in colours], low, high)
    uniform([d.blur for d in drawn if d.blur], 0.3, 2.0)
    sequences = [d.sequence for d in drawn]
    counts = torch.tensor([sequences.count(s) for s in set(sequences)]).double()
    assert len(counts) == 24
    assert float(((counts - count / 24) ** 2 / (count / 24)).sum()) < 49.7  # chi square, 23 degrees, 1 in 1000


def test_a_draw_is_a_function_of_its_key_and_options_do_not_shift_it():
    crop = POLICIES["simclr"][0]
    one, same, other = (Change.drawn(crop, generator("key", i)) for i in (1, 1, 2))
    assert one == same
    assert one != other
    bare, full = generator(5), generator(5)
    Change.drawn(Crop(flip=0.0), bare)
    Change.drawn(crop, full)
    assert torch.equal(bare.get_state(), full.get_state())


def test_what_is_not_drawn_is_neutral():
    off = Crop(flip=0.0, jitter=(0.4, 0.4, 0.4, 0.4), jitter_chance=0.0)
    on = Crop(flip=1.0, jitter_chance=1.0, grey=1.0, blur=1.0, solarize=1.0)
    for i in range(200):
        found = Change.drawn(off, generator(i))
        assert found._replace(sequence=()) == Change(sequence=())
        every = Change.drawn(on, generator(i))
        assert (every.flip, every.grey, every.solarize, every.colour) == (True, True, True, (1, 1, 1, 0))
        assert 0.1 <= every.blur <= 2.0


def test_the_record_is_what_was_drawn():
    record = Change(True, (1.5, 0.5, 1.25, -0.25), (3, 0, 2, 1), False, 0.75, True).record()
    assert {name: t.tolist() for name, t in record.items()} == {
        "flip": 1.0,
        "colour": [1.5, 0.5, 1.25, -0.25],
        "sequence": [3.0, 0.0, 2.0, 1.0],
        "grey": 0.0,
        "blur": 0.75,
        "solarize": 1.0,
    }
    assert {t.dtype for t in record.values()} == {torch.float32}


# Policies: (count, size, scale, interpolation, jitter, its chance, grey, blur, solarize, order), a row for each kind of crop

FIRST, LAST, GREY = "fjgbs", "jgbsf", "gjbsf"
STRONG, WEAK, UNEVEN, NONE = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.4, 0.1), (0.4, 0.4, 0.2, 0.1), (0.0, 0.0, 0.0, 0.0)
CUBIC, LINEAR = "bicubic", "bilinear"
TABLE = {
    "simclr": [(2, 224, 0.08, 1, CUBIC, STRONG, 0.8, 0.2, 0.5, 0, FIRST)],
    "moco1": [(2, 224, 0.2, 1, LINEAR, (0.4, 0.4, 0.4, 0.4), 1, 0.2, 0, 0, GREY)],
    "instdisc": [(1, 224, 0.2, 1, LINEAR, (0.4, 0.4, 0.4, 0.4), 1, 0.2, 0, 0, GREY)],
    "moco2": [(2, 224, 0.2, 1, LINEAR, WEAK, 0.8, 0.2, 0.5, 0, LAST)],
    "byol": [
        (1, 224, 0.08, 1, CUBIC, UNEVEN, 0.8, 0.2, 1, 0, FIRST),
        (1, 224, 0.08, 1, CUBIC, UNEVEN, 0.8, 0.2, 0.1, 0.2, FIRST),
    ],
    "mocov3": [
        (1, 224, 0.08, 1, LINEAR, UNEVEN, 0.8, 0.2, 1, 0, LAST),
        (1, 224, 0.08, 1, LINEAR, UNEVEN, 0.8, 0.2, 0.1, 0.2, LAST),
    ],
    "mocov3-resnet": [
        (1, 224, 0.2, 1, LINEAR, UNEVEN, 0.8, 0.2, 1, 0, LAST),
        (1, 224, 0.2, 1, LINEAR, UNEVEN, 0.8, 0.2, 0.1, 0.2, LAST),
    ],
    "swav": [
        (2, 224, 0.14, 1, LINEAR, STRONG, 0.8, 0.2, 0.5, 0, FIRST),
        (6, 96, 0.05, 0.14, LINEAR, STRONG, 0.8, 0.2, 0.5, 0, FIRST),
    ],
    "swav-160": [
        (2, 160, 0.08, 1, LINEAR, STRONG, 0.8, 0.2, 0.5, 0, FIRST),
        (4, 96, 0.05, 0.14, LINEAR, STRONG, 0.8, 0.2, 0.5, 0, FIRST),
    ],
    "swav-two-crop": [(2, 224, 0.08, 1, LINEAR, STRONG, 0.8, 0.2, 0.5, 0, FIRST)],
    "dino": [
        (1, 224, 0.4, 1, CUBIC, UNEVEN, 0.8, 0.2, 1, 0, FIRST),
        (1, 224, 0.4, 1, CUBIC, UNEVEN, 0.8, 0.2, 0.1, 0.2, FIRST),
        (8, 96, 0.05, 0.4, CUBIC, UNEVEN, 0.8, 0.2, 0.5, 0, FIRST),
    ],
    "dino-800": [
        (1, 224, 0.25, 1, CUBIC, UNEVEN, 0.8, 0.2, 1, 0, FIRST),
        (1, 224, 0.25, 1, CUBIC, UNEVEN, 0.8, 0.2, 0.1, 0.2, FIRST),
        (10, 96, 0.05, 0.25, CUBIC, UNEVEN, 0.8, 0.2, 0.5, 0, FIRST),
    ],
    "dino-resnet": [
        (1, 224, 0.14, 1, CUBIC, UNEVEN, 0.8, 0.2, 1, 0, FIRST),
        (1, 224, 0.14, 1, CUBIC, UNEVEN, 0.8, 0.2, 0.1, 0.2, FIRST),
        (6, 96, 0.05, 0.14, CUBIC, UNEVEN, 0.8, 0.2, 0.5, 0, FIRST),
    ],
    "dino-two-crop": [
        (1, 224, 0.14, 1, CUBIC, UNEVEN, 0.8, 0.2, 1, 0, FIRST),
        (1, 224, 0.14, 1, CUBIC, UNEVEN, 0.8, 0.2, 0.1, 0.2, FIRST),
    ],
    "deepcluster": [(1, 224, 0.08, 1, LINEAR, NONE, 0.8, 0, 0, 0, FIRST)],
    "simclr-cifar": [(2, 32, 0.08, 1, CUBIC, WEAK, 0.8, 0.2, 0, 0, FIRST)],
    "moco-cifar": [(2, 32, 0.08, 1, LINEAR, WEAK, 0.8, 0.2, 0, 0, FIRST)],
    "symmetric": [(2, 32, 0.08, 1, CUBIC, STRONG, 0.8, 0.2, 0.5, 0, LAST)],
    "symmetric-weak": [(2, 32, 0.08, 1, CUBIC, WEAK, 0.8, 0.2, 0.5, 0, LAST)],
    "asymmetric": [
        (1, 32, 0.08, 1, CUBIC, UNEVEN, 0.8, 0.2, 0, 0, LAST),
        (1, 32, 0.08, 1, CUBIC, UNEVEN, 0.8, 0.2, 0, 0.2, LAST),
    ],
    "vicreg-cifar": [(2, 32, 0.2, 1, CUBIC, UNEVEN, 0.8, 0.2, 0, 0.1, LAST)],
}


def test_policies_are_the_published_ones():
    def row(c):
        order = "".join(step[0] for step in c.order)
        return (
            c.count, c.size, *c.scale, c.interpolation, c.jitter, c.jitter_chance, c.grey, c.blur, c.solarize, order,
        )  # fmt: skip

    assert {name: [row(crop) for crop in crops] for name, crops in POLICIES.items()} == TABLE
    every = {(c.flip, c.aspect, c.blur_sigma) for crops in POLICIES.values() for c in crops}
    assert every == {(0.5, (3 / 4, 4 / 3), (0.1, 2.0))}


@pytest.mark.parametrize(
    ("name", "image", "patch", "sizes"),
    [
        ("swav", 224, 16, [224, 96]),
        ("swav-160", 160, 16, [160, 96]),
        ("dino", 224, 8, [224, 224, 96]),
        ("swav", 32, 4, [32, 12]),
        ("swav", 32, 16, [32, 16]),
        ("swav", 96, 1, [96, 41]),
        ("simclr", 32, 4, [32]),
        ("simclr-cifar", 224, 16, [224]),
    ],
)
def test_a_policy_fits_the_size_of_the_model(name, image, patch, sizes):
    crops = policy(name, image, patch)
    assert [crop.size for crop in crops] == sizes
    assert [replace(crop, size=0) for crop in crops] == [replace(crop, size=0) for crop in POLICIES[name]]
    for crop in crops:
        check_crop(crop, "crops.0", image, patch)


def test_an_unknown_policy_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"^crops: 'moco-v3' is no known policy \(did you mean mocov3\?\); known are simclr, "):
        policy("moco-v3", 224)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"count": 0}, "count"),
        ({"count": 1000}, "count"),
        ({"size": 40}, "size"),
        ({"size": 12}, "size"),
        ({"size": 0}, "size"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"aspect": (0.0, 1.0)}, "aspect"),
        ({"flip": 1.5}, "flip"),
        ({"jitter_chance": -0.1}, "jitter_chance"),
        ({"grey": 2.0}, "grey"),
        ({"blur": float("nan")}, "blur"),
        ({"solarize": -1.0}, "solarize"),
        ({"jitter": (0.4, -0.1, 0.4, 0.1)}, "jitter"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "jitter"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
        ({"order": ("flip", "jitter", "grey", "blur")}, "order"),
        ({"order": ("flip", "flip", "jitter", "grey", "blur")}, "order"),
    ],
)
def test_a_bad_crop_is_refused_by_the_key_that_is_wrong(options, name):
    with pytest.raises(ValueError, match=rf"^crops\.1\.{name}: "):
        check_crop(Crop(**options), "crops.1", 32, 8)


def test_jitter_of_nothing_leaves_the_colours():
    image = picture()
    for i in range(20):
        change = Change.drawn(Crop(flip=0.0, jitter_chance=1.0), generator(i))
        assert_close(torch.from_numpy(pixels(change.applied(image))), torch.from_numpy(pixels(image)), rtol=0, atol=0)
