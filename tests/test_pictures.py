"""fw.data.pictures and preprocess: what any file becomes, and that hostile ones are named."""

import hashlib
import json
import os
import struct
import zlib
from io import BytesIO
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fw.data import Batches, eval_batches, preprocess
from fw.data import pictures as decoding
from fw.data.pictures import PIXELS, Decoded, decode, decode_labels, in_threads, read_all
from fw.data.preprocess import FILE, PROCESSORS, Preprocessor, levels, of_levels
from fw.errors import FwError
from fw.model import Model
from fw.models.pixels import normalised
from fw.models.vit import vit
from fw.models.vit_config import Dinov2Config, ViTConfig
from fw.processors.image import Images, fitted

fuzz = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def picture(height, width, channels=3):
    """The same integers everywhere: gradients, with edges in them."""
    y, x, c = np.ogrid[:height, :width, :channels]
    return ((x * 7 + y * 13 * (c + 1) + x * y // 5 * (c + 2)) % 256).astype(np.uint8)


def encoded(pixels, kind="PNG", **options):
    file = BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels.squeeze())
    image.save(file, kind, **options)
    return file.getvalue()


# Decoding -------------------------------------------------------------------------------------

GREY, COLOUR = picture(6, 5, 1), picture(6, 5)
ALPHA = np.array([0, 128, 255] * 10, np.uint8).reshape(6, 5, 1)
# As alpha_composite rounds; a definition, not the code under test.
ON_WHITE = np.rint(COLOUR * (ALPHA / 255) + 255 * (1 - ALPHA / 255))
PALETTE = Image.fromarray(GREY.squeeze() % 4).convert("P")
PALETTE.putpalette([9, 8, 7, 60, 50, 40, 1, 2, 3, 200, 201, 202])
INDICES = np.asarray(PALETTE)
TABLE = np.array((PALETTE.getpalette() or [])[:12]).reshape(4, 3)

FILES = {
    "grey": (encoded(GREY), np.repeat(GREY, 3, 2)),
    "colour": (encoded(COLOUR), COLOUR),
    "bmp": (encoded(COLOUR, "BMP"), COLOUR),
    "ppm": (encoded(COLOUR, "PPM"), COLOUR),
    "webp": (encoded(COLOUR, "WEBP", lossless=True), COLOUR),
    "16 bits": (
        encoded(GREY.astype(np.uint16) * 256 + 99),
        np.repeat(GREY, 3, 2),
    ),
    "16 bits, pgm": (encoded(GREY.astype(np.uint16) * 256, "PPM"), np.repeat(GREY, 3, 2)),
    "1 bit": (encoded(Image.fromarray(GREY.squeeze() > 99)), np.repeat(255 * (GREY > 99), 3, 2)),
    "alpha": (encoded(np.concatenate([COLOUR, ALPHA], 2)), ON_WHITE),
    "palette": (encoded(PALETTE), TABLE[INDICES]),
    "gif": (encoded(PALETTE, "GIF"), TABLE[INDICES]),
    "palette with a transparent colour": (
        encoded(PALETTE, transparency=2),
        np.where((INDICES == 2)[..., None], 255, TABLE[INDICES]),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_mode_becomes_colours_and_grey(name, tmp_path):
    file, expected = FILES[name]
    path = tmp_path / "a.jpg"  # whatever it is called
    path.write_bytes(file)
    tolerance = 1 if name == "alpha" else 0
    np.testing.assert_allclose(decode(path).astype(int), expected, atol=tolerance)
    # Grey as ITU-R 601-2 has it.
    grey = expected @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(decode(file, 1)[..., 0], grey, atol=1 + tolerance)


def test_jpegs_are_near_and_a_printer_s_colours_are_converted():
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    assert np.abs(decode(encoded(smooth, "JPEG", quality=95)).astype(int) - smooth).max() < 12
    printed = Image.fromarray(smooth).convert("CMYK")
    assert np.abs(decode(encoded(printed, "JPEG", quality=95)).astype(int) - smooth).max() < 16


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_pictures_are_turned_the_right_way_up(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(COLOUR, exif=exif)
    np.testing.assert_array_equal(decode(file), TURNS[orientation](COLOUR))


def test_maps_of_classes_keep_their_numbers():
    np.testing.assert_array_equal(decode_labels(encoded(PALETTE)), INDICES)
    np.testing.assert_array_equal(decode_labels(encoded(GREY)), GREY[..., 0])
    deep = GREY[..., 0].astype(np.uint16) * 257
    np.testing.assert_array_equal(decode_labels(encoded(deep)), deep)
    with pytest.raises(FwError, match="bytes: expected a map of classes"):
        decode_labels(encoded(COLOUR))
    for orientation in (1, 6):  # turned or not, it was a JPEG
        exif = Image.Exif()
        exif[0x0112] = orientation
        with pytest.raises(FwError, match=r"bytes: .* a JPEG, .*; save maps as PNG"):
            decode_labels(encoded(GREY, "JPEG", exif=exif))


# Hostile files --------------------------------------------------------------------------------


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def claimed(width, height):
    """A PNG of a few bytes that says it is that large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 10**4))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


HOSTILE = {
    "giant": (claimed(9000, 9000), f"at most {PIXELS} pixels; its header says 9000 × 9000"),
    "bomb": (claimed(2**31 - 1, 2**31 - 1), f"at most {PIXELS} pixels"),
    "empty size": (claimed(0, 7), ": expected a "),
    "missing data": (claimed(5000, 5000), "expected a whole picture"),
    "cut off": (FILES["colour"][0][:-40], "expected a whole picture"),
    "cut jpeg": (encoded(picture(64, 64), "JPEG")[:-200], "expected a whole picture"),
    "another format": (encoded(COLOUR, "TIFF"), r"expected a picture \(JPEG, PNG"),
    "text": (b"hello", "it is none, or damaged"),
    "nothing": (b"", "it is none, or damaged"),
    "floats": (b"Pf\n2 2\n-1.0\n" + bytes(16), "expected a picture of 8 or 16 bits"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(name, tmp_path):
    file, message = HOSTILE[name]
    path = tmp_path / "a.png"
    path.write_bytes(file)
    with pytest.raises(FwError, match=f"{path}: .*{message}|{path}.*{message}"):
        decode(path)


def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    path = tmp_path / "a.png"
    for make_it in (
        lambda: None,
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
    ):
        make_it()
        with pytest.raises(FwError, match=f"{path}: "):
            decode(path)
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FwError, match=f"{path}: expected at most {2**29} bytes"):
        decode(path)


def test_what_is_wrong_with_the_machine_is_no_corrupt_picture(monkeypatch):
    with pytest.raises(FwError, match=r"^/proc/self/mem: cannot be read: Input/output error"):
        decode("/proc/self/mem")

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(decoding.Image, "open", full)
    with pytest.raises(MemoryError):
        list(read_all([FILES["colour"][0]] * 2, decode, on_bad=print))


def readable(source):
    try:
        decode(source)
    except FwError:
        return False
    return True


SEEDS = [FILES[name][0] for name in ("colour", "bmp", "ppm", "webp", "16 bits", "gif")]
SEEDS += [encoded(picture(40, 40), "JPEG", progressive=True)]


@fuzz
@given(data=st.data())
def test_damaged_bytes_are_decoded_or_refused(data):
    damaged = bytearray(data.draw(st.sampled_from(SEEDS)))
    where = st.integers(0, len(damaged) - 1)
    for at, byte in data.draw(st.dictionaries(where, st.integers(0, 255), max_size=6)).items():
        damaged[at] = byte
    readable(bytes(damaged[: data.draw(where) + 1] if data.draw(st.booleans()) else damaged))


def test_bad_pictures_are_counted_and_left_out_within_a_tolerance():
    good, bad = encoded(COLOUR), encoded(COLOUR)[:-40]
    sources, messages = [good] * 39 + [bad, good, bad], []
    with pytest.raises(FwError, match="bytes: expected a whole picture"):
        list(read_all(sources, decode))
    places = [at for at, _ in read_all(sources, decode, on_bad=messages.append)]
    assert places == [*range(39), 40] and len(messages) == 2
    with pytest.raises(FwError, match="3 of the first 43 pictures are bad, and 5% of 43 may be"):
        list(read_all([*sources, bad], decode, on_bad=messages.append))


# An array that decodes ------------------------------------------------------------------------


@pytest.mark.parametrize("held", [0, 5 * 90, 10**6])
def test_decoded_is_an_array(held):
    arrays = [picture(6, 5) + np.uint8(i) for i in range(23)]
    whole, calls = np.stack(arrays), []

    def make(source):
        calls.append(source)
        return decode(source)

    pictures: Any = Decoded([encoded(a) for a in arrays], make, (6, 5, 3), held=held)
    assert (pictures.shape, pictures.dtype, len(pictures)) == (whole.shape, whole.dtype, 23)
    for index in (4, -1, slice(3, 9), np.array([22, 0, 0, 7]), np.array([], np.int64), slice(None)):
        np.testing.assert_array_equal(pictures[index], whole[index])
    calls.clear()
    _ = pictures[np.arange(23)]
    assert len(calls) == 23 - min(held // 90, 23)

    labels = np.arange(23, dtype=np.int32)
    for step in (0, 5):
        batch = Batches({"images": pictures, "labels": labels}, size=4, seed=1)(step)
        np.testing.assert_array_equal(batch["images"], whole[batch["labels"]])
    *_, last = eval_batches({"images": pictures}, 10, empty={"images": 0})
    np.testing.assert_array_equal(last["images"][:3], whole[20:])
    assert last["images"].shape == (10, 6, 5, 3) and not last["images"][3:].any()


def test_a_file_that_went_bad_is_named(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(COLOUR))
    pictures = Decoded([path], decode, (6, 5, 3), held=0)
    _ = pictures[0]
    path.write_bytes(encoded(picture(7, 5)))
    with pytest.raises(FwError, match=r"a\.png: expected uint8 \(6, 5, 3\) of a picture"):
        _ = pictures[0]


def test_threads_keep_the_order_and_the_error():
    items = list(range(200))
    assert list(in_threads(lambda i: i * i, items, threads=7)) == [i * i for i in items]
    with pytest.raises(FwError, match="bytes: "):
        list(in_threads(decode, [encoded(COLOUR)] * 20 + [b""], threads=3))


# Preprocessing --------------------------------------------------------------------------------

# SHA-256 of the levels that transformers 5.23 made of `picture` with Pillow 12.3, over all SIZES;
# scripts/bench/preprocess.py compares them anew, and with torchvision's.
SIZES = ((90, 61), (61, 90), (40, 200), (64, 64))
GOLDEN = {
    "vit": ("ViT", {}, "eeaa743ed24585da"),
    "vit, lanczos": (
        "ViT", {"resample": 1, "size": {"height": 96, "width": 64}}, "fa704e1aef858147"
    ),
    "deit": ("DeiT", {}, "e8edaf8e6cb04d6e"),
    "dinov2": ("Bit", {"size": {"shortest_edge": 256}}, "d10036c7ac235ab3"),
    "small for its crop": (
        "Bit", {"size": {"shortest_edge": 40}, "crop_size": 65}, "144a512f1d2a9754"
    ),
    "resnet": (
        "ConvNext", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}, "d10036c7ac235ab3"
    ),
    "convnext": ("ConvNext", {}, "c606bb09b4e6724f"),
    "efficientnet": ("EfficientNet", {}, "d87a552b7dfe358b"),
    "nearest": (
        "EfficientNet", {"do_center_crop": True, "resample": 0, "rescale_offset": True},
        "cdfbeece9cc233dc",
    ),
    "a number": ("ViT", {"size": 50, "do_normalize": False}, "bcb56f9f6805288e"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_levels_are_those_of_transformers(name, tmp_path):
    family, config, digest = GOLDEN[name]
    config = {"image_processor_type": f"{family}ImageProcessor"} | config
    (tmp_path / FILE).write_text(json.dumps(config))
    made = preprocess.load(tmp_path)
    found = hashlib.sha256()
    for height, width in SIZES:
        found.update(made.pixels(picture(height, width)).tobytes())
    assert found.hexdigest()[:16] == digest

    made.save(tmp_path)
    assert preprocess.load(tmp_path) == made


def test_the_numbers_of_each_processor(tmp_path):
    def load(**config):
        (tmp_path / FILE).write_text(json.dumps(config))
        return preprocess.load(tmp_path)

    resnet = load(feature_extractor_type="ConvNextFeatureExtractor", size=224, crop_pct=0.875)
    assert (resnet.size, resnet.crop) == (256, (224, 224))
    assert load(image_processor_type="ConvNextImageProcessorFast").size == (384, 384)
    assert load(image_processor_type="ViTImageProcessor", size=None).shape == (224, 224, 3)
    net = load(image_processor_type="EfficientNetImageProcessor", rescale_offset=True)
    assert net.mean == (1.5, 1.5, 1.5) and net.std == (0.25, 0.25, 0.25)
    grey = load(image_processor_type="ViTImageProcessor", image_mean=[0.3], image_std=[0.2])
    assert grey.shape == (224, 224, 1) and load(
        image_processor_type="ViTImageProcessor", image_mean=0.3, image_std=0.2
    ).mean == (0.3, 0.3, 0.3)
    plain = load(image_processor_type="BitImageProcessor", do_rescale=False, do_normalize=False)
    assert (plain.mean, plain.std, plain.scale) == ((0,) * 3, (1,) * 3, 1)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
sizes = st.one_of(
    values, st.fixed_dictionaries({"height": values, "width": values}),
    st.fixed_dictionaries({"shortest_edge": values}), st.integers(1, 64),
)  # fmt: skip
KEYS = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "do_pad",
        "rescale_factor", "do_normalize", "image_mean", "image_std", "crop_pct", "include_top",
        "rescale_offset", "image_processor_type")  # fmt: skip


@fuzz
@given(st.sampled_from([*PROCESSORS]), st.dictionaries(st.sampled_from(KEYS), sizes, max_size=3))
def test_strange_configs_are_refused_by_file_or_work(tmp_path, family, strange):
    path = tmp_path / FILE
    path.write_text(json.dumps({"image_processor_type": f"{family}ImageProcessor"} | strange))
    try:
        made = preprocess.load(tmp_path)
        if np.prod(made.shape) < 10**6:
            assert made.pixels(picture(9, 8)).shape == made.shape
    except FwError as error:
        assert str(path) in str(error) or "different sizes" in str(error)


def test_a_preprocessor_refuses_what_makes_no_sense():
    for make, message in (
        (lambda: Preprocessor(size=0), "sides of 1 "),
        (lambda: Preprocessor(size=(2**15, 2)), "sides of 1 "),
        (lambda: Preprocessor(resample=6), "resample: expected 0 … 5"),
        (lambda: Preprocessor(mean=(0.5,) * 2), "a number for grey or for each of three"),
        (lambda: Preprocessor(std=(0.0,) * 3), "std above 0"),
        (lambda: Preprocessor(size=224).shape, "different sizes; give crop"),
        (lambda: Preprocessor(size=8000).pixels(picture(1, 4000)), "at most"),
        (
            lambda: Preprocessor((8, 2**14)).pixels(np.zeros((2**13, 1, 3), np.uint8)),
            "pixels: 8192 × 1 pixels would be resized to 8192 × 16384, and then",
        ),
        (lambda: Preprocessor().pixels(np.zeros((3, 3))), "pixels: expected uint8"),
    ):
        with pytest.raises(FwError, match=message):
            make()


def test_the_device_normalises_as_numpy_does():
    images = picture(8, 9)[None]
    train = np.stack([picture(8, 9), 255 - picture(8, 9)])
    made = of_levels(levels(train), train.shape[1:3])
    np.testing.assert_allclose(made.mean, (train / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(made.std, (train / 255).std((0, 1, 2)), rtol=1e-12)
    seen = Model(None, lambda key: {}, lambda v, batch, **_: (batch, v), {})
    model = normalised(seen, made.mean, made.std, made.scale)
    found, _ = jax.jit(lambda images: model.apply({}, {"images": images, "x": images}))(images)
    expected = (images / 255 - made.mean) / made.std
    np.testing.assert_allclose(found["pixel_values"], expected, atol=5e-7)
    assert found["pixel_values"].dtype == np.float32 and set(found) == {"pixel_values", "x"}
    assert set(model.apply({}, {"x": images})[0]) == {"x"}


# For models -----------------------------------------------------------------------------------


def test_a_new_model_s_numbers_are_those_of_all_images_and_few_wait_in_memory(monkeypatch):
    train = [picture(7, 9) // (i + 1) for i in range(99)]
    expected = of_levels(levels(np.stack(train)), (7, 9))
    made = fitted([encoded(pixels) for pixels in train], 0)
    assert made == expected
    assert fitted([GREY, GREY], 4).shape == (4, 4, 1)

    whole = []
    work = decoding.in_threads
    monkeypatch.setattr(
        decoding,
        "in_threads",
        lambda *given: (whole.append(max(map(np.size, found))) or found for found in work(*given)),
    )
    fitted([picture(64, 64)] * 9, 0)
    assert max(whole) == 3 * 256  # levels, no pixels


def test_images_none_of_which_is_good_are_told_of():
    with pytest.raises(FwError, match="none of the training images is good; bytes: expected a pic"):
        fitted([b"none"], 8, skip=True)


@pytest.mark.parametrize("config", [ViTConfig, Dinov2Config])
def test_only_some_models_take_images_of_another_size(config):
    """Released DINOv2 have an image_size of 518 and are given 224 pixels."""
    given: Any = {"intermediate_size": 8} if config is ViTConfig else {}
    made = config(
        image_size=12, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_labels=2, **given,
    )  # fmt: skip
    processor = Images(Preprocessor(9, (8, 8)))
    if config is ViTConfig:
        with pytest.raises(FwError, match=r"come out as \(8, 8\); the model takes \(12, 12\)"):
            processor.fits(made, "image_classification")
        return
    processor.fits(made, "image_classification")
    model = processor.adapt(vit(made))
    variables = jax.eval_shape(model.init, jax.random.key(0))
    images = processor.golden("", [picture(20, 30)])
    assert jax.eval_shape(model.apply, variables, images)[0].shape == (1, 2)
