"""fw.data.augment: a function of seed and place alone, and each change what it is said to be."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fw.data import Batches, feed
from fw.data.augment import MOST, Augment, augment_pairs
from fw.data.draws import noise, uniform
from fw.data.mixing import beta
from fw.data.randaugment import OPERATIONS, randaugment, recolour
from fw.data.rows import Rows
from fw.data.warp import smooth_field, warp, warp_labels
from fw.errors import FwError
from fw.labels import IGNORE
from sharding import make_mesh, rules

seeded = settings(derandomize=True, deadline=None, max_examples=50)

OPTIONS = {
    "resized": Augment(resized=0.3),
    "crop": Augment(crop=3),
    "flip": Augment(flip=True),
    "turn": Augment(turn=True),
    "elastic": Augment(elastic=(1.5, 3.0)),
    "jitter": Augment(jitter=(0.4, 0.4, 0.4, 0.1)),
    "randaugment": Augment(randaugment=(3, 9)),
    "mixup": Augment(mixup=0.5),
    "cutmix": Augment(cutmix=1.0),
    "all": Augment.parse(
        "resized=0.5,crop=2,flip,turn,elastic=1/3,jitter=.2/.2/.2/.1,randaugment=2/9,mixup=.4,"
        "cutmix=1"
    ),
}
PAIRED = ("resized", "crop", "flip", "turn", "elastic", "jitter")


def data_set(rows=23, side=12, channels=3, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (rows, side, side, channels), np.uint8)
    return Rows({"images": images, "labels": np.arange(rows, dtype=np.int32)}, {})


def same(a, b):
    assert set(a) == set(b)
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name])


# Random numbers -------------------------------------------------------------------------------


@seeded
@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5),
    st.integers(1, 70),
    st.integers(0, 2**64 - 1),
)
def test_the_cipher_is_numpy_s(seed, places, count, stream):
    found = uniform(seed, np.array(places, np.int64), count, stream)
    for row, place in zip(found, places, strict=True):
        np.testing.assert_array_equal(row, noise(seed, place, count, stream))


def test_numbers_are_uniform_and_independent():
    found = uniform(1, np.arange(4000), 8)
    assert found.min() >= 0 and found.max() < 1
    # Five standard deviations of a mean, and of a correlation, of 4,000.
    assert np.abs(found.mean(0) - 0.5).max() < 5 / np.sqrt(12 * 4000)
    assert np.abs(np.corrcoef(found.T) - np.eye(8)).max() < 5 / np.sqrt(4000)
    assert not (uniform(1, np.arange(9), 8, stream=1) == found[:9]).any()


# A function of seed and place -----------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_its_rows_whatever_the_part(name, channels):
    rows = data_set(channels=channels)
    batches = Batches(rows.arrays, 7, 3, OPTIONS[name].change(rows, seed=3))
    for step in (0, 10**9):
        whole = batches(step)
        parts = [batches.take(step, part) for part in (slice(2), slice(2, 3), slice(3, 7))]
        same(whole, {k: np.concatenate([p[k] for p in parts]) for k in whole})
        same(whole, Batches(rows.arrays, 7, 3, OPTIONS[name].change(rows, 3))(step))
    images = rows.arrays["images"]
    assert whole["images"].dtype == np.uint8 and whole["images"].shape == (7, *images.shape[1:])
    # The same example in another epoch, and with another seed, is another picture.
    often = np.arange(40)
    change = OPTIONS[name].change(rows, 3)
    given_rows = {k: v[np.zeros(40, int)] for k, v in rows.arrays.items()}
    made = change(given_rows, often)["images"]
    assert len({picture.tobytes() for picture in made}) >= (2 if name == "flip" else 8)
    other = OPTIONS[name].change(rows, 4)(given_rows, often)["images"]
    assert (made != other).any()
    np.testing.assert_array_equal(
        rows.arrays["images"], data_set(channels=channels).arrays["images"]
    )


def test_golden_bytes():
    """A change here makes every old run impossible to resume."""
    rows = data_set()
    change = Augment.parse("crop=3,flip,turn,mixup=0.4,cutmix=1").change(rows, 5)
    made = change(dict(rows.arrays), np.arange(23) + 10**6)
    found = hashlib.sha256(b"".join(np.ascontiguousarray(made[k]).tobytes() for k in sorted(made)))
    assert found.hexdigest()[:16] == GOLDEN


GOLDEN = "79c0fa9f487ae1e8"


def test_no_option_moves_the_numbers_of_another():
    rows = data_set()
    places = np.arange(23)
    flipped = Augment(flip=True).change(rows, 0)(dict(rows.arrays), places)["images"]
    # A jitter of one shade of hue changes bytes, and not which pictures are mirrored.
    both = Augment(flip=True, crop=1).change(rows, 0)(dict(rows.arrays), places)["images"]
    mirrored = (flipped != rows.arrays["images"]).any((1, 2, 3))
    for i in range(23):
        inside = [
            (both[i] == moved).mean()
            for moved in _moves(rows.arrays["images"][i][:, :: -1 if mirrored[i] else 1], 1)
        ]
        assert max(inside) == 1


def _moves(picture, most):
    high, wide = picture.shape[:2]
    padded = np.pad(picture, ((most, most), (most, most), (0, 0)))
    for y in range(2 * most + 1):
        for x in range(2 * most + 1):
            yield padded[y : y + high, x : x + wide]


def test_what_is_new_in_a_batch_comes_to_the_devices():
    rows = data_set(24)
    batches = Batches(rows.arrays, 8, 0, OPTIONS["mixup"].change(rows, 0))
    same(feed(batches, 3, make_mesh("data=4"), rules("data")), batches(3))


# What is done ---------------------------------------------------------------------------------


def test_crops_are_windows_of_the_padded_picture_and_all_occur():
    picture = data_set(1, 6).arrays["images"][0]
    windows = [w.tobytes() for w in _moves(picture, 2)]
    rows = Rows({"images": picture[None], "labels": np.zeros(1, np.int32)}, {})
    images = np.broadcast_to(picture, (1000, *picture.shape))
    made = Augment(crop=2).change(rows, 0)({**rows.arrays, "images": images}, np.arange(1000))
    counts = np.bincount([windows.index(p.tobytes()) for p in made["images"]], minlength=25)
    assert counts.min() > 10  # of 40 ± 6


def test_a_flip_is_every_other_one_and_a_turn_one_of_eight():
    picture = data_set(1, 5).arrays["images"][0]
    images, labels = np.broadcast_to(picture, (4000, 5, 5, 3)), np.zeros(4000, np.int32)
    rows, places = Rows({"images": images, "labels": labels}, {}), np.arange(4000)
    made = Augment(flip=True).change(rows, 0)(rows.arrays, places)["images"]
    assert abs((made == picture[:, ::-1]).all((1, 2, 3)).mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)
    turned = [np.rot90(p, k).tobytes() for p in (picture, picture.swapaxes(0, 1)) for k in range(4)]
    made = Augment(turn=True).change(rows, 0)(rows.arrays, places)["images"]
    counts = np.bincount([turned.index(p.tobytes()) for p in made], minlength=8)
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


def test_mixed_labels_say_what_was_mixed():
    # Row i is of the shade 10 i, so that a pixel tells whose it is.
    images = np.broadcast_to(
        (10 * np.arange(20, dtype=np.uint8))[:, None, None, None], (20, 16, 16, 1)
    )
    rows = Rows({"images": images, "labels": np.arange(20, dtype=np.int32)}, {})
    arrays = {k: np.tile(v, (50, *[1] * (v.ndim - 1))) for k, v in rows.arrays.items()}
    places = np.arange(1000)
    for augment in (Augment(mixup=0.3), Augment(cutmix=1.0), Augment(mixup=1.0, cutmix=1.0)):
        made = augment.change(rows, 0)(arrays, places)
        first, other, share = made["labels"], made["other_labels"], made["share"]
        assert share.dtype == np.float32 and ((share >= 0) & (share <= 1)).all()
        np.testing.assert_array_equal(first, arrays["labels"])
        assert len(np.unique(other)) == 20
        means = made["images"].mean((1, 2, 3))
        np.testing.assert_allclose(means, 10 * (share * first + (1 - share) * other), atol=0.51)
        levels = np.array([len(np.unique(p)) for p in made["images"]])
        assert (levels.max() == 1) == (augment.cutmix == 0) and levels.max() <= 2
        if augment.mixup and augment.cutmix:
            assert 0.3 < (levels == 1).mean() < 0.8


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_shares_are_of_the_beta_distribution(alpha):
    from scipy import stats

    shares = beta(uniform(0, np.arange(5000), 40), alpha)
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_a_second_picture_is_changed_by_numbers_of_its_own():
    picture = data_set(1, 6).arrays["images"]
    rows = Rows({"images": picture, "labels": np.zeros(1, np.int32)}, {})
    made = Augment(flip=True, mixup=1.0).change(rows, 0)(
        {k: np.repeat(v, 100, 0) for k, v in rows.arrays.items()}, np.arange(100)
    )
    alone = [picture[0], picture[0][:, ::-1]]
    assert any(not any((p == q).all() for q in alone) for p in made["images"])


@pytest.mark.parametrize("name", PAIRED)
def test_maps_follow_their_pictures(name):
    """A picture whose pixels tell their class keeps doing so, but where edges are blended."""
    side, count = 24, 30
    y, x = np.mgrid[:side, :side]
    maps = np.broadcast_to(((x // 12) + 2 * (y // 12)).astype(np.int32), (count, side, side)).copy()
    shades = (40 + 50 * maps[..., None]).astype(np.uint8)
    augment = replace(OPTIONS[name], jitter=(0.1, 0, 0, 0)) if name == "jitter" else OPTIONS[name]
    images, labels = augment_pairs(shades, maps, augment, 0, np.arange(count))
    assert labels.dtype == np.int32 and (labels != maps).any() == (name != "jitter")
    told = np.where(labels == IGNORE, 0, 40 + 50 * labels)
    near = np.abs(images[..., 0].astype(int) - told) <= (25 if name == "jitter" else 1)
    assert near.mean() > (0.9 if name in ("elastic", "resized") else 0.999)
    if name == "crop":
        assert (labels == IGNORE).any()


def test_bending_is_interpolation():
    from scipy import ndimage

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 2), np.uint8)
    field = smooth_field(rng.random((2, 20, 30)), 2.0, 3.0)
    places = np.mgrid[:20, :30] + field
    for channel in range(2):
        expected = ndimage.map_coordinates(
            pixels[..., channel].astype(float), places, order=1, mode="nearest"
        )
        np.testing.assert_allclose(warp(pixels, field)[..., channel], expected, atol=0.51)
    labels = rng.integers(0, 9, (20, 30)).astype(np.int32)
    expected = ndimage.map_coordinates(labels, places, order=0, mode="nearest")
    assert (warp_labels(labels, field) == expected).mean() > 0.995  # ties apart


# Pillow's operations --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("which", range(len(OPERATIONS)))
def test_an_operation_keeps_the_form_and_begins_with_nothing(which, mode):
    pixels = np.random.default_rng(which).integers(20, 200, (33, 47, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    numbers = np.array([(which + 0.5) / len(OPERATIONS), 0.7])
    strong = randaugment(image, 30, numbers)
    assert strong.size == image.size and strong.mode == mode
    name = list(OPERATIONS)[which]
    changes = {"identity"} | ({"color"} if mode == "L" else set())
    assert (strong.tobytes() == image.tobytes()) == (name in changes)
    if name not in ("autocontrast", "equalize"):
        weak = np.asarray(randaugment(image, 0, numbers)).astype(int)
        assert np.abs(weak - np.asarray(image)).max() <= 1


def test_geometry_is_what_its_name_says():
    line, tall = np.zeros((31, 31), np.uint8), np.arange(31)
    line[:, 15] = 255
    image, share = Image.fromarray(line), 15 / 30

    def centre(name, sign, turned=False):
        which = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
        given = image.transpose(Image.Transpose.TRANSPOSE) if turned else image
        made = np.asarray(randaugment(given, 15, [which, 0.9 if sign > 0 else 0.1])).astype(float)
        made = made.T if turned else made
        return (made * tall).sum(1) / made.sum(1)

    for sign in (1, -1):
        for axis, turned in (("x", False), ("y", True)):
            sheared = 15 - sign * 0.3 * share * (tall + 0.5)
            np.testing.assert_allclose(centre(f"shear {axis}", sign, turned), sheared, atol=0.1)
            moved = 15 - sign * 150 / 331 * share * 31
            np.testing.assert_allclose(centre(f"translate {axis}", sign, turned), moved, atol=0.1)
        rotated = 15 + np.tan(np.radians(sign * 15)) * (tall - 15)
        np.testing.assert_allclose(centre("rotate", sign)[2:-2], rotated[2:-2], atol=0.3)


def test_colours_change_as_said():
    pixels = np.full((2, 2, 3), (200, 100, 50), np.uint8)
    image = Image.fromarray(pixels)
    ends = {
        n: np.asarray(recolour(image, (0.5, 0, 0, 0), (n, 0.5, 0.5, 0.5)))[0, 0] for n in (0, 0.5)
    }
    assert ends[0].tolist() == [100, 50, 25] and ends[0.5].tolist() == [200, 100, 50]
    grey = np.asarray(recolour(image, (0, 0, 1, 0), (0, 0, 0, 0)))[0, 0]
    assert np.ptp(grey) == 0
    turned = np.asarray(recolour(image, (0, 0, 0, 0.5), (0, 0, 0, 0)))[0, 0].astype(int)
    assert np.abs(turned - [50, 150, 200]).max() <= 6  # the opposite of orange is blue
    assert recolour(image, (0, 0, 0, 0), (0.1,) * 4).tobytes() == image.tobytes()


# Spelling -------------------------------------------------------------------------------------

number = st.integers(1, 50).map(lambda x: x / 100) | st.floats(1e-9, 0.5)
AUGMENTS = st.builds(
    Augment,
    resized=number, crop=st.integers(0, 9), flip=st.booleans(),
    turn=st.booleans(), elastic=st.just((0.0, 0.0)) | st.tuples(number, number),
    jitter=st.tuples(number, number, number, number),
    randaugment=st.tuples(st.integers(0, MOST), st.integers(0, 30)), mixup=number, cutmix=number,
)  # fmt: skip


@seeded
@given(AUGMENTS)
def test_an_augmentation_is_spelt_and_read(augment):
    assert Augment.parse(str(augment)) == augment
    assert str(Augment()) == "" and Augment.parse(" ") == Augment()
    assert str(Augment.parse("elastic=4.0/0.30")) == "elastic=4/0.3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop=4,blur", "'blur': expected one of resized, crop"),
        ("crop", "'crop': expected crop=INT"),
        ("flip=1", "'flip=1': expected flip"),
        ("crop=4,crop=2", "'crop=2': expected crop=INT, once"),
        ("randaugment=2", "expected randaugment=INT/INT"),
        ("randaugment=2/9/1", "expected randaugment=INT/INT"),
        ("randaugment=9/9", "randaugment: expected at most 8 operations"),
        ("mixup=nan", "mixup: expected a number in 0 … 1"),
        ("mixup=2", "mixup: expected a number in 0 … 1; got 2"),
        ("resized=0", "resized: expected a share above 0"),
        ("jitter=1/1/1/1", "jitter: expected four shares"),
        ("elastic=0/4", "elastic: expected two numbers"),
        ("crop=-1", "crop: expected 0 … 1024"),
    ],
)
def test_bad_spellings_name_the_part(text, message):
    with pytest.raises(FwError, match=f"^augment: {message}|^augment: .*{message}"):
        Augment.parse(text)


def test_what_pictures_cannot_have_is_refused():
    rows = data_set()
    maps = Rows({"images": rows.arrays["images"], "labels": rows.arrays["images"][..., 0]}, {})
    oblong = Rows({**rows.arrays, "images": rows.arrays["images"][:, :5]}, {})
    for augment, given_rows, message in (
        (Augment(mixup=0.1), maps, "maps of classes cannot have mixup"),
        (Augment(turn=True), oblong, "turn: expected squares; got 5 × 12"),
        (Augment(crop=6), oblong, "crop: expected at most 5 pixels"),
    ):
        with pytest.raises(FwError, match=message):
            augment.change(given_rows, 0)
    places = np.arange(oblong.rows)
    made = Augment(crop=5).change(oblong, 0)(dict(oblong.arrays), places)
    assert made["images"].shape == oblong.arrays["images"].shape
