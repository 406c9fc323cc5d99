"""Segmentation: figures against scikit-learn and brute force, tiles against whole images, data."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, jaccard_score
from sklearn.metrics.cluster import pair_confusion_matrix

from fw import metrics
from fw.data import Batches, prefetch
from fw.data.preprocess import levels, of_levels
from fw.data.segments import (
    Crops,
    Palette,
    Segmented,
    find_pairs,
    fit,
    load,
    read_pairs,
    whole_rows,
)
from fw.errors import FwError
from fw.evaluate import evaluate, make_counter
from fw.labels import IGNORE
from fw.metrics.segmentation import regions
from fw.model import Model
from fw.models.pixels import normalised
from fw.models.unet import UNetConfig, unet
from fw.optimizer import AdamW, optimizer
from fw.processors import Segments
from fw.recipe import Finetune
from fw.step import initial_state, make_step
from fw.tasks import make_task, pixel_loss, segmentation, soft_dice
from fw.tiles import shares, starts, tiled
from sharding import create, make_mesh, put, rules, shardings

RULES = rules()
EM = Path(__file__).parents[2] / "shared" / "data" / "em_segmentation" / "train"


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_overlaps_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([IGNORE, 0, 1, 3], (4, 9, 7)).astype(np.int32)  # nobody has class 2
    found = np.where(rng.random(labels.shape) < 0.6, np.maximum(labels, 0), 1).astype(np.int32)
    counts = metrics.merge(*(metrics.confusion(labels[i], found[i], 4) for i in range(4)))
    report = metrics.segmentation_report(counts, ["a", "b", "c", "d"])
    y, x = labels[labels != IGNORE], found[labels != IGNORE]
    scores: dict[str, Any] = {"iou": jaccard_score, "dice": f1_score}
    for name, score in scores.items():
        each = [getattr(one, name) for one in report["classes"]]
        np.testing.assert_allclose(each, score(y, x, average=None), rtol=1e-12)
        np.testing.assert_allclose(report[f"mean_{name}"], score(y, x, average="macro"))
    assert report["pixel_error"] == pytest.approx(1 - accuracy_score(y, x))
    assert [one.name for one in report["classes"]] == ["a", "b", "d"]


def flooded(classes):
    """Regions, a pixel at a time."""
    found, count = np.zeros(classes.shape, int), 0
    for start in np.ndindex(classes.shape):
        if classes[start] < 1 or found[start]:
            continue
        count += 1
        waiting = [start]
        while waiting:
            at = waiting.pop()
            if found[at]:
                continue
            found[at] = count
            for side in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                near = at[0] + side[0], at[1] + side[1]
                if (
                    0 <= near[0] < classes.shape[0]
                    and 0 <= near[1] < classes.shape[1]
                    and classes[near] == classes[at]
                ):
                    waiting.append(near)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_rand_error_counts_pairs_of_pixels(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, IGNORE], (9, 8), p=[0.3, 0.4, 0.25, 0.05]).astype(np.int32)
    predicted = np.where(rng.random(labels.shape) < 0.8, np.maximum(labels, 0), 1)
    true, found = flooded(labels), flooded(np.where(labels == IGNORE, 0, predicted))
    for ours, theirs in ((regions(labels), true), (regions(predicted), flooded(predicted))):
        assert len({*zip(ours.ravel().tolist(), theirs.ravel().tolist(), strict=True)}) == (
            len(np.unique(theirs))
        )
    pixels = [(true[at], found[at]) for at in np.ndindex(labels.shape) if true[at]]
    together = same = both = 0
    for (i, j), (k, l) in itertools.combinations(pixels, 2):
        together += i == k
        same += j == l and j > 0
        both += i == k and j == l and j > 0
    error = metrics.rand_error(labels, predicted)
    assert error == pytest.approx(1 - 2 * both / (together + same))
    # And where every pixel of background is a cluster of its own, scikit-learn's pairs.
    alone = np.where(found > 0, found, -np.arange(1, found.size + 1).reshape(found.shape))
    (_, fp), (fn, tp) = pair_confusion_matrix(true[true > 0], alone[true > 0])
    assert error == pytest.approx(1 - 2 * tp / (2 * tp + fp + fn))
    assert metrics.rand_error(np.maximum(labels, 0), np.maximum(labels, 0)) == 0
    assert metrics.rand_error(np.zeros((3, 3), int), np.ones((3, 3), int)) is None


def test_one_missing_pixel_of_a_membrane_is_an_error_of_regions_not_of_pixels():
    labels = np.ones((21, 21), int)
    labels[:, 10] = 0
    broken = labels.copy()
    broken[10, 10] = 1
    assert np.mean(broken != labels) < 0.003
    error = metrics.rand_error(labels, broken)
    assert error is not None and error > 0.3


def test_soft_dice_is_written_again_in_numpy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 6, 5, 4)).astype(np.float32)
    labels = rng.integers(-1, 4, (3, 6, 5)).astype(np.int32)
    expected = 0.0
    for x, y in zip(logits.astype(np.float64), labels, strict=True):
        p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        p, one = p[y >= 0], np.eye(4)[y[y >= 0]]
        dice = (2 * (p * one).sum(0) + 1) / (p.sum(0) + one.sum(0) + 1)
        expected += len(p) * (1 - dice.mean())
    found = soft_dice(jnp.asarray(logits), {"labels": jnp.asarray(labels)})
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    batch = {"labels": jnp.asarray(labels)}
    plain, weight = pixel_loss(jnp.asarray(logits), batch)
    total, same = pixel_loss(jnp.asarray(logits), batch, 0.5)
    np.testing.assert_allclose(total - plain, 0.5 * expected, rtol=1e-4)
    assert float(weight) == float(same) == (labels >= 0).sum()


# --- the task -------------------------------------------------------------------------------------


def test_a_data_set_is_judged_on_any_mesh_as_image_by_image():
    rng = np.random.default_rng(0)
    items = []
    for size in ((12, 12), (8, 10), (12, 4), (7, 12), (9, 9)):
        labels = (rng.random(size) < 0.8).astype(np.int32)
        wrong = np.where(rng.random(size) < 0.1, 1 - labels, labels)
        items.append(Segmented((255 * wrong[..., None]).astype(np.uint8), labels))
    rows = whole_rows(items, 8)
    assert rows.arrays["images"].shape == (5, 16, 16, 1)
    task = make_task("segmentation", ("membrane", "cell"))
    look = Model(None, lambda _: {}, lambda v, b, **_: (b["pixel_values"], v), {})
    look = normalised(look, [0.5], [0.5])

    def forward(variables, batch):
        x = look.apply(variables, batch)[0]
        return jnp.concatenate([-x, x], 3)

    found = [item.image[..., 0].astype(int) // 255 for item in items]
    errors: Any = [metrics.rand_error(i.labels, f) for i, f in zip(items, found, strict=True)]
    same = sum((i.labels == f).sum() for i, f in zip(items, found, strict=True))
    pixels = sum(i.labels.size for i in items)
    for spec in ("data=1", "data=2,sequence=2"):
        mesh = make_mesh(spec)
        counter = make_counter(forward, task)
        summary = evaluate(counter, {}, rows, size=2, mesh=mesh, rules=RULES)
        assert summary.figures["rand_error"] == pytest.approx(np.mean(errors))
        assert summary.figures["pixel_error"] == pytest.approx(1 - same / pixels)
        assert summary.value == summary.figures["mean_iou"]
        assert "membrane" in summary.text and "rand error" in summary.text


# --- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", [True, False])
def test_shares_sum_to_one_wherever_tiles_lie(blend):
    for length, tile, overlap, multiple in itertools.product(
        (8, 20, 33, 64), (8, 16), (0, 3, 7), (1, 4)
    ):
        if length < tile or length % multiple or tile - overlap < multiple:
            continue
        begins = starts(length, tile, overlap, multiple)
        assert all(start % multiple == 0 for start in begins)
        assert all(b - a <= tile - overlap for a, b in itertools.pairwise(begins))
        total = np.zeros(length)
        for start, share in zip(begins, shares(begins, tile, blend), strict=True):
            total[start : start + tile] += share
        np.testing.assert_allclose(total, 1, rtol=1e-6)


@pytest.mark.usefixtures("quickly_compiled")
def test_tiles_of_a_unet_are_its_whole_image_once_they_overlap_by_twice_its_reach():
    config = UNetConfig(3, num_channels=2, width=4, depth=1)
    model = unet(config)
    variables = jax.jit(model.init)(jax.random.key(0))
    apply = jax.jit(lambda x: model.apply(variables, {"pixel_values": x})[0])
    image = np.random.default_rng(0).normal(size=(53, 70, 2)).astype(np.float32)
    padded = np.pad(image, ((0, 1), (0, 0), (0, 0)), mode="reflect")
    whole = np.asarray(apply(padded[None]))[0, :53]
    assert (config.reach, config.multiple) == (9, 2)
    options = {"size": (32, 32), "multiple": 2, "batch_size": 3}
    exact = tiled(apply, image, overlap=2 * config.reach, join="centre", **options)
    np.testing.assert_allclose(exact, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    for overlap, join in ((6, "centre"), (2 * config.reach, "blend")):
        off = np.abs(tiled(apply, image, overlap=overlap, join=join, **options) - whole)
        assert 1e-3 < off.max() / np.abs(whole).max() < 1  # near the cuts, and nowhere far

    # As far as `reach` says is a pixel seen, and no further.
    for at in (26, 27):
        other = padded.copy()
        other[at, 30] += 10
        moved = np.abs(np.asarray(apply(other[None]))[0, :53] - whole).sum((1, 2))
        seen = np.flatnonzero(moved > 0)
        assert at - config.reach <= seen.min() < at - 4 and at + 4 < seen.max() <= at + config.reach


def test_images_smaller_than_a_tile_are_reflected():
    image = np.arange(15.0, dtype=np.float32).reshape(3, 5, 1)
    seen = []

    def fn(x):
        seen.append(x)
        return np.concatenate([x, -x], 3)

    found = tiled(fn, image, size=(8, 8), overlap=2, batch_size=2)
    np.testing.assert_array_equal(found, np.concatenate([image, -image], 2))
    np.testing.assert_array_equal(seen[0][0, :, 0, 0], [0, 5, 10, 5, 0, 5, 10, 5])
    np.testing.assert_array_equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize(("change", "said"), [
    ({"overlap": 8}, "tiles of 8 pixels that overlap by 8 do not get on"),
    ({"join": "mean"}, "join 'mean' is unknown; choose one of blend, centre"),
    ({"multiple": 3}, "tiles of 8 pixels: expected a multiple of 3"),
    ({"batch_size": 0}, "batch_size 0"),
    ({"fn": lambda x: x[:, :4]}, "expected an answer"),
])  # fmt: skip
def test_tiles_that_cannot_be_are_refused(change, said):
    options = {"fn": lambda x: x, "size": (8, 8), "overlap": 2} | change
    with pytest.raises(FwError, match=said):
        tiled(image=np.zeros((20, 20, 1)), **options)


# --- data -----------------------------------------------------------------------------------------


def write(folder, name, image, labels):
    for inner, pixels in (("image", image), ("label", labels)):
        (folder / inner).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / inner / name)


def draw(folder, count, sizes=((20, 24), (9, 30)), values=(0, 128, 255)):
    """Pictures that tell the value of their label."""
    rng = np.random.default_rng(0)
    for i in range(count):
        labels = rng.choice(values, sizes[i % len(sizes)]).astype(np.uint8)
        write(folder, f"{i}.png", labels // 2, labels)


def test_pairs_are_split_by_their_names_and_read_by_the_palette(tmp_path):
    draw(tmp_path, 40)
    splits = find_pairs(tmp_path)
    assert {len(pairs) > 0 for pairs in splits.values()} == {True}
    names = [pair.image.name for pairs in splits.values() for pair in pairs]
    assert len(names) == len({*names}) == 40
    palette = fit(splits["train"], ignore=128)
    assert palette == Palette((0, 255), ("0", "255"), 128)
    palette.save(tmp_path)
    assert load(tmp_path) == palette
    items = read_pairs(splits["test"], palette, 1)
    assert {item.labels.dtype.name for item in items} == {"int16"}
    for item, pair in zip(items, splits["test"], strict=True):
        values = np.asarray(Image.open(pair.label))
        np.testing.assert_array_equal(item.image[..., 0], values // 2)
        np.testing.assert_array_equal(item.labels == IGNORE, values == 128)
        np.testing.assert_array_equal(
            palette.paint(item.labels) * (values != 128), values * (values != 128)
        )
    rows = whole_rows(items, 16)
    assert rows.arrays["images"].shape[1:] == (32, 32, 1)
    assert (rows.arrays["labels"][:] != IGNORE).sum() == sum((i.labels >= 0).sum() for i in items)


def test_whole_pictures_are_padded_when_they_are_asked_for():
    rng = np.random.default_rng(0)
    items = []
    for size in ((20, 24), (9, 30), (16, 16)):
        labels = rng.integers(0, 200, size).astype(np.int16)
        items.append(Segmented(labels[..., None].astype(np.uint8), labels))
    arrays: Any = whole_rows(items, 16).arrays
    assert not any(isinstance(array, np.ndarray) for array in arrays.values())
    edges = [[(0, 32 - side) for side in item.labels.shape] for item in items]
    whole = {
        "images": np.stack([
            np.pad(item.image, [*edge, (0, 0)], mode="reflect")
            for item, edge in zip(items, edges, strict=True)
        ]),
        "labels": np.stack([
            np.pad(item.labels.astype(np.int32), edge, constant_values=IGNORE)
            for item, edge in zip(items, edges, strict=True)
        ]),
    }  # fmt: skip
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (whole[name].shape, whole[name].dtype)
        for index in (1, -1, slice(1, 9), np.array([2, 0, 0]), np.array([], np.int64)):
            np.testing.assert_array_equal(array[index], whole[name][index])
            assert array[index].dtype == whole[name].dtype


def test_folders_of_splits_are_taken_as_they_are(tmp_path):
    draw(tmp_path / "train", 30)
    draw(tmp_path / "test", 2)
    splits = find_pairs(tmp_path)
    assert len(splits["test"]) == 2 and len(splits["train"]) + len(splits["dev"]) == 30
    assert 0 < len(splits["dev"]) < 10
    draw(tmp_path / "val", 3)
    assert [len(find_pairs(tmp_path)[split]) for split in ("train", "dev", "test")] == [30, 3, 2]


def test_names_pair_whatever_they_end_in(tmp_path):
    draw(tmp_path, 20)
    before = {split: [p.label for p in pairs] for split, pairs in find_pairs(tmp_path).items()}
    for path in (tmp_path / "label").iterdir():
        path.rename(path.with_suffix(".bmp"))
    after = {split: [p.label for p in pairs] for split, pairs in find_pairs(tmp_path).items()}
    assert after == {s: [p.with_suffix(".bmp") for p in labels] for s, labels in before.items()}
    Image.new("L", (3, 3)).save(tmp_path / "label" / "7.png")
    with pytest.raises(FwError, match=r"7\.png: expected one file 7\.\*; .*7\.bmp is another"):
        find_pairs(tmp_path)


def test_maps_that_are_none_are_left_out_within_a_tolerance(tmp_path):
    draw(tmp_path, 40)
    pairs = [pair for split in find_pairs(tmp_path).values() for pair in split]
    whole, bad = fit(pairs), []
    for pair in pairs[:2]:
        Image.new("RGB", (24, 20)).save(pair.label)
    with pytest.raises(FwError, match=f"{pairs[0].label}: expected a map .* got mode RGB"):
        fit(pairs)
    assert fit(pairs, on_bad=bad.append) == whole
    assert [message.split(":")[0] for message in bad] == [str(p.label) for p in pairs[:2]]
    with pytest.raises(FwError, match=r"mode RGB; 2 of the first 2 pictures are bad"):
        fit(pairs[:3], on_bad=bad.append)
    with pytest.raises(FwError, match=r"none of the training maps is good; .*mode RGB"):
        fit(pairs[:1], on_bad=bad.append)
    recipe = Finetune(task="segment", data=str(tmp_path), skip_bad_rows=True)
    with pytest.raises(FwError, match=r"mode RGB; 2 of the first 2 pictures are bad"):
        Segments.fit(recipe, {"train": pairs[:2]}, None)
    found, told = Segments.fit(recipe, {"train": pairs}, None), []
    assert found.palette == whole
    found.rows(recipe, pairs, whole.names, learn=False, on_bad_row=told.append)
    assert told == bad[:2]


def test_crops_are_a_function_of_seed_and_place():
    rng = np.random.default_rng(0)
    items = []
    for size in ((20, 24), (9, 30), (16, 16)):
        labels = rng.integers(0, 200, size).astype(np.int16)
        items.append(Segmented(labels[..., None].astype(np.uint8), labels))
    crops = Crops(items, (12, 16), seed=3)
    batches = Batches(crops.arrays, size=4, seed=3, change=crops)
    batch = batches(7)
    assert batch["images"].shape == (4, *crops.arrays["images"].shape[1:])
    assert batch["labels"].dtype == crops.arrays["labels"].dtype
    for rows in (slice(0, 1), slice(2, 4)):
        for name, part in batches.take(7, rows).items():
            np.testing.assert_array_equal(part, batch[name][rows])
    counted = batch["labels"] != IGNORE
    np.testing.assert_array_equal(batch["images"][..., 0][counted], batch["labels"][counted])
    assert not counted.all()  # of the low picture, a quarter is reflection
    many = np.concatenate([batches(step)["labels"][:, 0, 0] for step in range(30)])
    assert len({*many.tolist()}) > 30
    assert (
        Batches(crops.arrays, 4, 3, Crops(items, (12, 16), seed=4))(7)["images"] != batch["images"]
    ).any()
    flipped = Crops(
        items, (12, 16), 3, lambda made, places: {k: v[:, ::-1] for k, v in made.items()}
    )
    np.testing.assert_array_equal(
        Batches(flipped.arrays, 4, 3, flipped)(7)["labels"], batch["labels"][:, ::-1]
    )


def test_data_that_does_not_fit_is_refused(tmp_path):
    draw(tmp_path, 12)
    palette = fit(find_pairs(tmp_path)["train"])
    pairs = find_pairs(tmp_path)["train"]
    write(tmp_path, pairs[0].image.name, np.zeros((4, 4), np.uint8), np.full((4, 4), 9, np.uint8))
    with pytest.raises(FwError, match="value 9 is none of the classes 0, 128, 255"):
        read_pairs(pairs, palette, 1)
    bad = []
    assert len(read_pairs(pairs, palette, 1, on_bad=bad.append)) == len(pairs) - 1
    assert len(bad) == 1 and pairs[0].label.name in bad[0]
    write(tmp_path, pairs[0].image.name, np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8))
    with pytest.raises(FwError, match=r"\(4, 5\), and its picture is \(4, 4\)"):
        read_pairs(pairs, palette, 1)
    noise = np.arange(300, dtype=np.uint16).reshape(15, 20)
    write(tmp_path, pairs[0].image.name, np.zeros((15, 20), np.uint8), noise)
    with pytest.raises(FwError, match="more than 256 values"):
        fit(pairs)
    (tmp_path / "label" / pairs[0].label.name).unlink()
    with pytest.raises(FwError, match=r"expected a file .+\.\* in .*label; there is none; 1 such"):
        find_pairs(tmp_path)


@pytest.mark.parametrize(("text", "said"), [
    ("[]", "expected an object of values, names and ignore"),
    ('{"values": 3, "names": [], "ignore": null}', "expected lists"),
    ('{"values": [1, 1], "names": ["a", "b"], "ignore": null}', "expected different values"),
    ('{"values": [1, 1e99], "names": ["a", "b"], "ignore": null}', "expected different values"),
    ('{"values": [1, 2], "names": ["a"], "ignore": null}', "expected 2 different names"),
    ('{"values": [1, 2], "names": ["a", "b"], "ignore": 2}', "expected different values"),
    (json.dumps({"values": [*range(2**15 + 1)], "names": [], "ignore": None}), "at most 32768"),
])  # fmt: skip
def test_a_damaged_palette_is_refused(tmp_path, text, said):
    (tmp_path / "palette.json").write_text(text)
    with pytest.raises(FwError, match=said):
        load(tmp_path)


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not EM.is_dir(), reason="needs the electron microscopy pictures")
def test_a_small_unet_learns_membranes():
    splits = find_pairs(EM)
    palette = fit(splits["train"], names=("membrane", "cell"))
    train = read_pairs(splits["train"], palette, 1)
    held = whole_rows(read_pairs(splits["dev"] + splits["test"], palette, 1), 8)
    images = np.stack([item.image for item in train])
    pixels = of_levels(levels(images), images.shape[1:3])
    model = normalised(unet(UNetConfig(2, width=8, depth=3)), pixels.mean, pixels.std, pixels.scale)
    task, mesh, steps = segmentation(palette.names, dice=0.5), make_mesh("data=1"), 300
    crops = Crops(train, (128, 128), seed=0)
    batches = Batches(crops.arrays, 4, 0, crops)
    tx = optimizer(AdamW(learning_rate=3e-3), steps)
    lie = shardings(model.axes, jax.eval_shape(model.init, jax.random.key(0)), mesh, RULES)
    state = initial_state(create(model.init, jax.random.key(0), shardings=lie), tx, mesh)
    step = make_step(model, task.loss, tx, mesh=mesh, rules=RULES)
    for batch in prefetch(batches, stop=steps):
        state, _ = step(state, put(batch, mesh, RULES))
    counter = make_counter(lambda v, b: model.apply(v, b)[0], task)
    summary = evaluate(counter, state.variables, held, size=1, mesh=mesh, rules=RULES)
    # If all were cell, 0.44 and 0.23.
    assert summary.figures["mean_dice"] > 0.85
    assert summary.figures["pixel_error"] < 0.1

    first = held.arrays["images"][0]
    predict = jax.jit(
        lambda x: jax.nn.softmax(model.apply(state.variables, {"images": x})[0], axis=-1)
    )
    whole = np.asarray(predict(first[None]))[0].argmax(-1)
    parts = tiled(predict, first, size=(256, 256), overlap=64, multiple=8).argmax(-1)
    assert np.mean(parts != whole) < 0.005
