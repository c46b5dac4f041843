import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.testing import assert_close
from torchvision.transforms.v2 import functional

from mmssl.random import generator
from modalities.vision.augment import (
    FLIP_FIRST,
    POLICIES,
    Change,
    Crop,
    check_crop,
    policy,
    recoloured,
    told,
)
from modalities.vision.pixels import (
    blur,
    brightness,
    contrast,
    cut,
    cut_out,
    floats,
    gradients,
    hue,
    noise,
    read,
    saturation,
)


def picture(size=40, seed=0):
    """Waves of colour with noise: every hue, dark and bright."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size]
    waves = [127 + 110 * np.sin(x / (3 + c) + 2 * c) * np.cos(y / (6 - c) + c) for c in range(3)]
    return Image.fromarray((np.stack(waves, -1) + draw.normal(0, 12, (size, size, 3))).clip(0, 255).astype(np.uint8))


# Operations


def levels(image):
    """(C, H, W) float64 from 0 to 255."""
    return functional.pil_to_tensor(image).double()


def exact(operation, x, *options):
    """What torchvision's float kernel does with pixels from 0 to 255."""
    return operation(x / 255, *options) * 255


def close(found, wanted, tolerance=2e-3):
    assert found.dtype == torch.float32
    assert_close(found.double(), wanted, rtol=0, atol=tolerance)


def near(found, image, most, mean):
    """Within levels of an image that was rounded at each step."""
    apart = (found.double() - levels(image)).abs()
    assert float(apart.max()) <= most
    assert float(apart.mean()) <= mean


@pytest.mark.parametrize("factor", [0.2, 0.75, 1.0, 1.3, 1.8])
def test_each_factor_changes_what_torchvision_changes(factor):
    image = picture()
    kinds = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for i, wanted in enumerate(kinds):
        colour = [1.0, 1.0, 1.0, 0.0]
        colour[i] = factor
        found = recoloured(floats(read(image)), colour, (0, 1, 2, 3))
        # 0.2989 for 0.299 of red, and a mean or luma that Pillow rounds, with what is rounded then
        close(found, exact(wanted, levels(image), factor), 0.03)
        near(found, wanted(image, factor), 1 + abs(factor - 1) / 2 + 0.01, 0.6)


@pytest.mark.parametrize("turns", [-0.5, -0.2, -0.003, 0.1, 0.37, 0.5])
def test_hue_turns_as_in_torchvision(turns):
    image = picture()
    found = hue(floats(read(image)), turns)
    close(found, exact(functional.adjust_hue, levels(image), turns))
    near(found, functional.adjust_hue(image, turns), 14, 2.0)  # which has 256 hues
    ours = floats(read(image))
    assert_close(found.amax(0), ours.amax(0))
    assert_close(found.amin(0), ours.amin(0), atol=1e-4, rtol=0)


def test_hues_of_pure_colours_and_of_none():
    red, grey_, cyan = ((255.0, 0, 0), (90.0, 90, 90), (0.0, 255, 255))
    x = torch.tensor([red, grey_, cyan]).T[:, None]
    assert_close(hue(x.clone(), 0.5), torch.tensor([cyan, grey_, red]).T[:, None], atol=1e-3, rtol=0)
    assert_close(hue(x.clone(), -1 / 3)[:, 0, 0], torch.tensor([0.0, 0, 255]), atol=1e-3, rtol=0)
    assert_close(hue(x.clone(), 1 / 6)[:, 0, 0], torch.tensor([255.0, 255, 0]), atol=1e-3, rtol=0)


def test_each_image_of_a_batch_may_have_its_own_factor():
    images = torch.stack([floats(read(picture(seed=i))) for i in range(3)])
    for operation, factors in (
        (brightness, (0.5, 1.0, 1.6)), (contrast, (0.5, 1.0, 1.6)), (saturation, (0.0, 0.7, 1.9)), (hue, (-0.4, 0.0, 0.2)),
    ):  # fmt: skip
        together = operation(images.clone(), torch.tensor(factors).view(3, 1, 1, 1))
        for one, image, factor in zip(together, images, factors, strict=True):
            assert_close(one, operation(image.clone(), factor))


def test_colours_are_changed_in_the_sequence_drawn():
    image, colour = picture(), (1.4, 0.6, 1.5, 0.15)
    kinds = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)
    found = []
    for sequence in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        wanted = levels(image)
        for i in sequence:
            wanted = exact(kinds[i], wanted, colour[i])
        found.append(recoloured(floats(read(image)), colour, sequence))
        close(found[-1], wanted, 0.1)
    assert min(float((found[i] - found[i - 1]).abs().mean()) for i in range(3)) > 1


def test_an_unchanged_colour_costs_nothing_and_nothing_is_changed_in_place():
    x = floats(read(picture()))
    before = x.clone()
    assert recoloured(x, (1.0, 1.0, 1.0, 0.0), (3, 2, 1, 0)) is x
    assert torch.equal(Change().applied(x), x)
    Change(True, (1.4, 0.6, 1.5, 0.15), (0, 1, 2, 3), True, 1.0, True, 1, 0.1).applied(x)
    assert torch.equal(x, before)


def test_grey_solarize_and_flip_are_those_of_torchvision():
    image = picture()
    for change, wanted in (
        (Change(grey=True), functional.rgb_to_grayscale(image, 3)),
        (Change(solarize=True), functional.solarize(image, 128)),
        (Change(flip=True), functional.horizontal_flip(image)),
    ):
        found = change.applied(read(image))
        assert found.is_contiguous()
        near(found, wanted, 0.51 if change.grey else 0, 0.3)
    bands = Change(solarize=True).applied(read(Image.frombytes("L", (256, 1), bytes(range(256)))))[0, 0]
    assert bands.tolist() == [*range(128), *range(127, -1, -1)]


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_gaussian_with_that_sigma(sigma):
    image, inside = picture(), (slice(None), slice(8, -8), slice(8, -8))
    found = Change(blur=sigma).applied(read(image))
    exact = functional.gaussian_blur(levels(image), [23, 23], [sigma, sigma])
    close(found[inside], exact[inside], 0.5)  # it is cut off at three sigma
    pillow = levels(image.filter(ImageFilter.GaussianBlur(sigma)))[inside]  # three boxes
    apart = (found[inside] - pillow).abs()
    assert float(apart.max()) < 6
    assert float(apart.mean()) < 0.8
    if sigma > 0.4:
        assert float(apart.mean()) < 0.2 * float((levels(image)[inside] - pillow).abs().mean())


def test_large_images_are_read_too():
    image = Image.new("RGB", (4000, 1200), (10, 20, 30))  # more than one of Pillow's blocks
    image.putpixel((3999, 1199), (200, 100, 50))
    for picture_ in (image, image.convert("L"), image.resize((40, 12))):
        found = floats(read(picture_))
        assert torch.equal(found, torch.from_numpy(np.array(picture_)).float().reshape(*found.shape[1:], -1).permute(2, 0, 1))


def test_blur_keeps_what_is_flat_and_continues_the_edge():
    flat = torch.full((3, 20, 20), 77.0)
    assert_close(blur(flat, 1.7), flat)
    x = torch.rand(1, 1, 6, generator=generator("edge")) * 255
    wide = [float(x[0, 0, min(max(i, 0), 5)]) for i in range(-3, 9)]
    weights = [math.exp(-0.5 * d * d) for d in range(-3, 4)]
    wanted = [sum(w * wide[i + d] for d, w in enumerate(weights)) / sum(weights) for i in range(6)]
    assert_close(blur(x, 1.0)[0, 0], torch.tensor(wanted), rtol=1e-5, atol=1e-4)


def test_steps_come_in_the_order_of_the_policy():
    image, change = read(picture()), Change(True, (1.3, 0.8, 1.2, 0.1), (2, 0, 3, 1), True, 1.5, True)
    steps = {
        "flip": Change(flip=True),
        "jitter": Change(colour=change.colour, sequence=change.sequence),
        "grey": Change(grey=True),
        "blur": Change(blur=1.5),
        "solarize": Change(solarize=True),
    }
    results = []
    for order in (FLIP_FIRST, ("grey", "jitter", "blur", "solarize", "flip"), ("solarize", "blur", "jitter", "grey", "flip")):
        wanted = image
        for step in order:
            wanted = steps[step].applied(wanted)
        results.append(change.applied(image, order))
        assert_close(results[-1], wanted, rtol=0, atol=1e-3)
    assert min(float((results[i] - results[i - 1]).abs().mean()) for i in range(3)) > 1


def test_a_grey_image_is_changed_too():
    image = picture().convert("L")
    found = Change(True, (1.2, 0.7, 1.4, 0.2), (0, 1, 2, 3), True, 1.0, True).applied(read(image))
    wanted = functional.adjust_contrast(functional.adjust_brightness(functional.horizontal_flip(image), 1.2), 0.7)
    wanted = functional.solarize(wanted.filter(ImageFilter.GaussianBlur(1.0)), 128)
    assert found.shape == (1, 40, 40)
    near(found, wanted, 8, 1.5)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_rotation_turns_counter_clockwise_after_the_other_steps(quarters, mode):
    image = picture().convert(mode)
    found = Change(rotation=quarters).applied(read(image))
    near(found, functional.rotate(image, 90.0 * quarters), 0, 0)
    found = Change(flip=True, rotation=quarters).applied(read(image), ("jitter", "grey", "blur", "solarize", "flip"))
    near(found, functional.rotate(functional.horizontal_flip(image), 90.0 * quarters), 0, 0)


def test_a_quarter_turn_of_four_pixels():
    image = Image.frombytes("L", (2, 2), bytes([0, 1, 2, 3]))
    assert Change(rotation=1).applied(read(image)).tolist() == [[[1, 3], [0, 2]]]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("std", [0.02, 0.1])
def test_noise_is_gaussian_and_independent(mode, std):
    flat = floats(read(Image.new(mode, (96, 96), 100 if mode == "L" else (100, 128, 155))))
    apart = (noise(flat.clone(), std, generator("noise", mode)) - flat).double()
    n, exact = apart.numel(), 255 * std
    assert abs(float(apart.mean())) < 4 * exact / n**0.5
    assert abs(float(apart.std()) / exact - 1) < 4 / (2 * n) ** 0.5
    for sigmas in (1, 2):
        share = math.erf(sigmas / 2**0.5)
        assert abs(float((apart.abs() < sigmas * exact).double().mean()) - share) < 4 * (share * (1 - share) / n) ** 0.5
    for other in (apart.roll(1, 1), apart.roll(1, 2), *([apart.roll(1, 0)] if mode == "RGB" else [])):
        assert abs(float((apart * other).mean())) < 4.5 * exact**2 / n**0.5


def test_noise_is_that_of_torchvision_cut_off_at_black_and_white():
    image, std = picture(96), 0.3
    ours = Change(noise=std, noise_seed=7).applied(read(image))
    assert torch.equal(ours, Change(noise=std, noise_seed=7).applied(read(image)))
    assert not torch.equal(ours, Change(noise=std, noise_seed=8).applied(read(image)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = functional.gaussian_noise(levels(image) / 255, 0.0, std)
    one, other = (ours.double() / 255).flatten(), theirs.flatten()
    for fact in (lambda v: v, lambda v: v * v, lambda v: (v <= 0).double(), lambda v: (v >= 1).double()):
        a, b = fact(one), fact(other)
        assert 0.01 < float(a.mean()) < 1
        assert abs(float(a.mean() - b.mean())) < 4 * float((a.var() + b.var()) / len(a)) ** 0.5


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_box_is_cut_and_resized_as_pillow_does(interpolation, mode):
    image = picture(90).convert(mode)
    for box, size in (((7, 11, 60, 70), 32), ((0, 0, 90, 90), 90), ((20, 3, 12, 9), 32), ((89, 89, 1, 1), 8)):
        left, top, width, height = box
        found = cut(read(image), box, size, interpolation)
        assert found.dtype == torch.uint8
        found = floats(found)
        assert found.shape == (len(image.getbands()), size, size)
        resample = getattr(Image.Resampling, interpolation.upper())
        near(found, image.crop((left, top, left + width, top + height)).resize((size, size), resample), 1, 0.1)


@pytest.mark.parametrize("channels", [1, 3])
def test_cutout_is_the_square_of_the_paper(channels):
    draw = np.random.default_rng(0)
    x, reached = torch.randn(channels, 32, 32, generator=generator("cutout")), set()
    for _ in range(60):
        row, column, length = draw.integers(32), draw.integers(32), int(draw.choice([2, 8, 16, 32]))
        wanted, before = x.clone(), x.clone()
        for r in range(32):
            for c in range(32):
                if row - length // 2 <= r < row + length // 2 and column - length // 2 <= c < column + length // 2:
                    wanted[:, r, c] = 0
        found = cut_out(x, (column + draw.random()) / 32, (row + draw.random()) / 32, length / 32)
        assert torch.equal(found, wanted)
        assert torch.equal(x, before)
        reached.add(int((found[0] == 0).sum()) == length**2)
    assert reached == {True, False}  # it may reach beyond the image


@pytest.mark.parametrize("channels", [1, 3])
def test_sobel_gradients_match_a_slow_loop(channels):
    x = torch.randn(channels, 7, 7, generator=generator("sobel"), dtype=torch.float64)
    grey = [[sum(float(x[c, i, j]) for c in range(channels)) / channels for j in range(7)] for i in range(7)]

    def at(i, j):
        return grey[i][j] if 0 <= i < 7 and 0 <= j < 7 else 0.0

    wanted = torch.zeros(3, 7, 7, dtype=torch.float64)
    for i in range(7):
        for j in range(7):
            across = sum(w * (at(i + d, j - 1) - at(i + d, j + 1)) for d, w in ((-1, 1), (0, 2), (1, 1)))
            down = sum(w * (at(i - 1, j + d) - at(i + 1, j + d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
            wanted[:, i, j] = torch.tensor([across, down, (across**2 + down**2) ** 0.5])
    assert_close(gradients(x), wanted if channels == 3 else wanted[2:])


def test_a_slope_has_the_same_gradient_everywhere():
    across = torch.arange(9.0).expand(3, 9, 9)
    assert gradients(across)[:, 4, 4].tolist() == [-8.0, 0.0, 8.0]
    assert gradients(across.transpose(1, 2))[:, 4, 4].tolist() == [0.0, -8.0, 8.0]


def test_gradients_see_the_square_that_was_cut_out():
    x = torch.randn(3, 16, 16, generator=generator("both"))
    change = Change(cutout=(0.5, 0.5, 0.5), sobel=True)
    assert torch.equal(change.finished(x), gradients(cut_out(x, 0.5, 0.5, 0.5)))
    assert bool((change.finished(x)[:, 5:11, 5:11] == 0).all())
    assert Change().finished(x) is x


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


def test_chances_and_ranges_of_the_later_draws():
    crop, count = Crop(rotate=0.6, noise=0.3, noise_std=0.2, cutout=0.5, cutout_side=0.25, sobel=0.1), 2000
    source = generator("later chances")
    drawn = [Change.drawn(crop, source) for _ in range(count)]
    facts = torch.tensor([[d.rotation > 0, d.noise > 0, d.cutout[2] > 0, d.sobel, d.flip] for d in drawn]).double()
    chances = torch.tensor([0.6, 0.3, 0.5, 0.1, 0.5]).double()
    assert bool(((facts.mean(0) - chances).abs() < 4 * (chances * (1 - chances) / count).sqrt()).all())
    assert float((torch.corrcoef(facts.T) - torch.eye(5)).abs().max()) < 4 / count**0.5
    turns = torch.tensor([d.rotation for d in drawn if d.rotation])
    counts, wanted = torch.bincount(turns, minlength=4)[1:].double(), len(turns) / 3
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 13.8  # chi square, 2 degrees, 1 in 1000
    assert {d.noise for d in drawn} == {0.0, 0.2}
    seeds = [d.noise_seed for d in drawn if d.noise]
    assert len(set(seeds)) == len(seeds)
    squares = torch.tensor([d.cutout for d in drawn if d.cutout[2]], dtype=torch.float64)
    assert squares[:, 2].unique().tolist() == [0.25]
    ideal = ((torch.arange(len(squares), dtype=torch.float64) + 0.5) / len(squares))[:, None]
    assert float((squares[:, :2].sort(0).values - ideal).abs().max()) < 1.95 / len(squares) ** 0.5  # Kolmogorov, 1 in 1000
    assert abs(float(torch.corrcoef(squares[:, :2].T)[0, 1])) < 4 / len(squares) ** 0.5


def test_the_later_steps_move_nothing_that_was_drawn_before_them():
    crop, source = POLICIES["simclr"][0], generator("pinned", 2)
    found = Change.drawn(crop, source)
    following = float(torch.rand((), generator=source, dtype=torch.float64))
    # What this key gave before there were later steps.
    assert (found.flip, found.sequence, found.grey, found.solarize) == (True, (3, 1, 2, 0), False, False)
    assert found.colour == pytest.approx((1.35774228947, 1.50196756541, 0.80676947193, 0.16716916395), abs=1e-10)
    assert (found.blur, following) == pytest.approx((1.07306702006, 0.38108600043), abs=1e-10)
    later, source = replace(crop, rotate=1.0, noise=1.0, cutout=1.0, sobel=1.0), generator("pinned", 2)
    every = Change.drawn(later, source)
    assert every[:6] == found[:6]
    assert every.rotation > 0
    assert (every.noise, every.cutout[2], every.sobel) == (0.1, 0.5, True)
    assert float(torch.rand((), generator=source, dtype=torch.float64)) == following


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
    on = Crop(flip=1.0, jitter_chance=1.0, grey=1.0, blur=1.0, solarize=1.0, rotate=1.0, noise=1.0, cutout=1.0, sobel=1.0)
    for i in range(200):
        found = Change.drawn(off, generator(i))
        assert found._replace(sequence=()) == Change(sequence=())
        every = Change.drawn(on, generator(i))
        assert (every.flip, every.grey, every.solarize, every.colour) == (True, True, True, (1, 1, 1, 0))
        assert 0.1 <= every.blur <= 2.0
        assert (every.rotation in (1, 2, 3), every.noise, every.cutout[2], every.sobel) == (True, 0.1, 0.5, True)


def test_the_record_is_what_was_drawn():
    change = Change(True, (1.5, 0.5, 1.25, -0.25), (3, 0, 2, 1), False, 0.75, True, 3, 0.125, 99, (0.25, 0.75, 0.5), True)
    record = told(torch.tensor([[0.5, 0.25, 0.125, 1.0, *change.numbers()]]))
    assert {name: t[0].tolist() for name, t in record.items()} == {
        "box": [0.5, 0.25, 0.125, 1.0],
        "flip": 1.0,
        "colour": [1.5, 0.5, 1.25, -0.25],
        "sequence": [3.0, 0.0, 2.0, 1.0],
        "grey": 0.0,
        "blur": 0.75,
        "solarize": 1.0,
        "rotation": 3.0,
        "noise": 0.125,
        "cutout": [0.25, 0.75, 0.5],
        "sobel": 1.0,
    }
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in record.values())


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
    assert not any(c.rotate or c.noise or c.cutout or c.sobel for crops in POLICIES.values() for c in crops)


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
        ({"rotate": 1.1}, "rotate"),
        ({"noise": -0.1}, "noise"),
        ({"noise_std": 0.0}, "noise_std"),
        ({"noise_std": float("nan")}, "noise_std"),
        ({"cutout": float("nan")}, "cutout"),
        ({"cutout_side": 1.5}, "cutout_side"),
        ({"cutout_side": 0.0}, "cutout_side"),
        ({"sobel": 2.0}, "sobel"),
        ({"order": ("flip", "jitter", "grey", "blur")}, "order"),
        ({"order": ("flip", "flip", "jitter", "grey", "blur")}, "order"),
    ],
)
def test_a_bad_crop_is_refused_by_the_key_that_is_wrong(options, name):
    with pytest.raises(ValueError, match=rf"^crops\.1\.{name}: "):
        check_crop(Crop(**options), "crops.1", 32, 8)


def test_jitter_of_nothing_leaves_the_colours():
    image = read(picture())
    for i in range(20):
        change = Change.drawn(Crop(flip=0.0, jitter_chance=1.0), generator(i))
        assert torch.equal(change.applied(image), floats(image))
