"""Pictures are changed anew each time they are seen: cropped, turned, bent, recoloured, mixed.

`Augment` says how, and can be spelt in one line; `Augment.change` makes the function that `Batches`
calls. What happens to a row is a function of the seed and of its place in the endless stream of
batches, so of the example and the epoch, and of nothing else: parts of a batch can be made apart,
on any mesh. Each option draws its own numbers, so that none changes what another does.

Where copying is enough, NumPy copies (`crops`, `mixing`); where each picture is computed
(`randaugment`, `warp`), threads share the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import numpy as np
from PIL import Image

from fw.data import crops, mixing
from fw.data.crops import each
from fw.data.draws import noise, uniform
from fw.data.pictures import MODES
from fw.data.randaugment import STEPS, randaugment, recolour
from fw.data.rows import Rows
from fw.data.warp import smooth_field, warp, warp_labels
from fw.errors import FwError
from fw.labels import IGNORE
from fw.options import parted

_FORMS: Mapping[str, tuple[type, ...]] = {
    "resized": (float,), "crop": (int,), "flip": (), "turn": (),
    "elastic": (float, float), "jitter": (float,) * 4, "randaugment": (int, int),
    "mixup": (float,), "cutmix": (float,),
}  # fmt: skip
"""What follows an option's name when it is spelt: `crop=4,flip,randaugment=2/9`."""

MOST = 8
"""The most operations of a randaugment."""

# How many random numbers a row has for each, used or not: none moves what another gets.
_NEEDS = {
    "resized": 4 * crops.TRIES, "crop": 2, "flip": 1, "turn": 1, "jitter": 4,
    "randaugment": 2 * MOST, "mix": 4, "share": 2 * mixing.TRIES,
}  # fmt: skip
_ENDS = dict(zip(_NEEDS, accumulate(_NEEDS.values()), strict=True))


@dataclass(frozen=True)
class Augment:
    """What is done to the pictures of a training batch, in this order.

    Args:
        resized: a part of the picture, of at least this share of its area and with sides in the
            proportion 3/4 … 4/3, is resized to the whole; 1 for none.
        crop: pixels of black around the picture before one of its size is cut out.
        flip: every other picture is mirrored.
        turn: to one of the eight places of a square, where no side is up.
        elastic: how far pixels are displaced (root mean square), and how smoothly, in pixels.
        jitter: of brightness, contrast, saturation and hue; see `recolour`.
        randaugment: how many operations, and their magnitude in 0 … 30.
        mixup, cutmix: α in 0 … 1 of the Beta distribution of the share that a second picture has,
            of every pixel or of the area; with both, each picture has one of them.

    Raises:
        FwError: an option out of range.

    >>> augment = Augment.parse("crop=4, flip, randaugment=2/9, mixup=0.2")
    >>> augment.randaugment, str(augment)
    ((2, 9), 'crop=4,flip,randaugment=2/9,mixup=0.2')

    Sources: Szegedy et al. 2015 (arXiv:1409.4842) for `resized`; Zhang et al. 2018
    (arXiv:1710.09412); Yun et al. 2019 (arXiv:1905.04899); see `warp` and `randaugment`, too.
    """

    resized: float = 1.0
    crop: int = 0
    flip: bool = False
    turn: bool = False
    elastic: tuple[float, float] = (0.0, 0.0)
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    randaugment: tuple[int, int] = (0, 0)
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        """Check every option."""
        for name, good, wanted in (
            ("resized", 0 < self.resized <= 1, "a share above 0, up to 1"),
            ("crop", 0 <= self.crop <= 1024, "0 … 1024 pixels"),
            (
                "elastic",
                self.elastic == (0, 0) or all(0 < x <= 1000 for x in self.elastic),
                "two numbers of pixels above 0: how far, how smoothly",
            ),
            (
                "jitter",
                all(0 <= x <= most for x, most in zip(self.jitter, (1, 1, 1, 0.5), strict=True)),
                "four shares: three of at most 1, and for the hue at most 0.5",
            ),
            (
                "randaugment",
                0 <= self.randaugment[0] <= MOST and 0 <= self.randaugment[1] <= STEPS,
                f"at most {MOST} operations and a magnitude of at most {STEPS}",
            ),
            ("mixup", 0 <= self.mixup <= 1, "a number in 0 … 1"),
            ("cutmix", 0 <= self.cutmix <= 1, "a number in 0 … 1"),
        ):
            if not good:
                raise FwError(f"augment: {name}: expected {wanted}; got {getattr(self, name)}")

    @classmethod
    def parse(cls, text: str) -> "Augment":
        """Read an augmentation that is spelt as one option; an empty text is none.

        Raises:
            FwError: an option that there is not, or that is spelt twice or wrongly.

        >>> Augment.parse("crop=four")
        Traceback (most recent call last):
        ...
        fw.errors.FwError: augment: 'crop=four': expected crop=INT
        """
        options: dict[str, Any] = {}
        for part in parted(text):
            name, _, value = part.partition("=")
            form = _FORMS.get(name)
            if form is None:
                raise FwError(f"augment: {part!r}: expected one of {', '.join(_FORMS)}")
            wanted = "/".join(kind.__name__.upper() for kind in form)
            try:
                values = [kind(x) for kind, x in zip(form, value.split("/"), strict=bool(form))]
            except ValueError:
                values = None
            if values is None or name in options or bool(form) != ("=" in part):
                spelling = f"{name}={wanted}" if form else name
                again = ", once" if name in options else ""
                raise FwError(f"augment: {part!r}: expected {spelling}{again}")
            options[name] = tuple(values) if len(form) > 1 else values[0] if form else True
        return cls(**options)

    def __str__(self) -> str:
        """As `parse` reads it."""
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                values = value if isinstance(value, tuple) else (value,)
                spelt = "/".join(str(x).removesuffix(".0") for x in values)
                parts.append(field.name if value is True else f"{field.name}={spelt}")
        return ",".join(parts)

    def change(self, rows: Rows, seed: int) -> "Augmenting":
        """The function that `Batches` calls, its `change`.

        Args:
            rows: the data set: `images`, uint8 [R, H, W, C], and `labels`, int32 [R], or for maps
                of classes [R, H, W].
            seed: of the choices.

        Raises:
            FwError: an option that these pictures cannot have.
        """
        high, wide, channels = rows.arrays["images"].shape[1:]
        maps = len(rows.arrays["labels"].shape) > 1
        for bad, why in (
            (channels not in MODES, f"pictures of {channels} channels; expected 1 or 3"),
            (self.turn and high != wide, f"turn: expected squares; got {high} × {wide}"),
            (self.crop > min(high, wide), f"crop: expected at most {min(high, wide)} pixels"),
            (
                maps and (self.mixup or self.cutmix or self.randaugment[0]),
                "maps of classes cannot have mixup, cutmix or randaugment; elastic can bend them",
            ),
        ):
            if bad:
                raise FwError(f"augment: {why}")
        return Augmenting(self, rows.arrays, seed)


@dataclass(frozen=True, eq=False)
class Augmenting:
    """Changes the rows of a batch.

    Attributes:
        options: what is done.
        arrays: the data set's, which second pictures are taken from.
        seed: of the choices.

    >>> rows = Rows({"images": np.arange(16, dtype=np.uint8).reshape(2, 2, 2, 2)[..., :1],
    ...              "labels": np.array([0, 1], np.int32)}, {})
    >>> change = Augment(mixup=1.0).change(rows, seed=0)
    >>> sorted(change(dict(rows.arrays), np.array([4, 5])))
    ['images', 'labels', 'other_labels', 'share']
    """

    options: Augment
    arrays: Mapping[str, Any]
    seed: int

    def __call__(self, arrays: Mapping[str, Any], places: np.ndarray) -> dict[str, Any]:
        """Change the pictures, and the maps of their classes with them.

        Args:
            arrays: `images` and `labels` of some rows, and others.
            places: [B] int64, the place of each row in the stream.

        Returns:
            The same arrays; with mixup or cutmix also `other_labels` int32 [B] and `share` float32
            [B], that of the picture whose class `labels` has.
        """
        images, labels = np.asarray(arrays["images"]), np.asarray(arrays["labels"])
        maps = labels if labels.ndim > 1 else None
        draws = self._draw(places, stream=0)
        images, maps = self._change(images, maps, places, draws, stream=0)
        if maps is not None:
            labels = maps
        if not (self.options.mixup or self.options.cutmix):
            return {**arrays, "images": images, "labels": labels}
        second, choice, y, x = draws["mix"].T
        other = (second * len(self.arrays["labels"])).astype(np.int64)
        others = np.asarray(self.arrays["images"][other])
        others, _ = self._change(others, None, places, self._draw(places, stream=2), stream=2)
        o, numbers, where = self.options, draws["share"], np.ones(len(images), bool)
        if o.cutmix:
            where = choice < 0.5 if o.mixup else ~where
        share = np.empty(len(images), np.float32)
        blended, pasted = (mixing.beta(numbers, alpha or 1.0) for alpha in (o.mixup, o.cutmix))
        share[where] = mixing.blend(images, others, where, blended)
        share[~where] = mixing.paste(images, others, ~where, pasted, y, x)
        partners = np.asarray(self.arrays["labels"])[other]
        return {**arrays, "images": images, "other_labels": partners, "share": share}

    def _draw(self, places: np.ndarray, stream: int) -> dict[str, np.ndarray]:
        """The numbers in [0, 1) of each option, [B, what it needs]."""
        numbers = uniform(self.seed, places, sum(_NEEDS.values()), stream)
        return {name: numbers[:, end - _NEEDS[name] : end] for name, end in _ENDS.items()}

    def _change(
        self,
        images: np.ndarray,
        maps: np.ndarray | None,
        places: np.ndarray,
        draws: Mapping[str, np.ndarray],
        stream: int,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """All that is done to a picture alone; streams 2 and 3 are for the second of a pair."""
        o = self.options
        images = images.copy()
        maps = maps if maps is None else maps.copy()
        if o.resized < 1:
            boxes = crops.boxes(draws["resized"], o.resized, *images.shape[1:3])
            images = crops.resized(images, boxes, Image.Resampling.BILINEAR)
            maps = maps if maps is None else crops.resized(maps, boxes, Image.Resampling.NEAREST)
        if o.crop:
            shifts = (draws["crop"] * (2 * o.crop + 1)).astype(int) - o.crop
            images = crops.shifted(images, shifts, 0)
            maps = maps if maps is None else crops.shifted(maps, shifts, IGNORE)
        for array in (images,) if maps is None else (images, maps):
            if o.flip:
                crops.mirror(array, draws["flip"][:, 0] < 0.5)
            if o.turn:
                crops.turn(array, (draws["turn"][:, 0] * 8).astype(int))
        if o.elastic[0]:
            self._bend(images, maps, places, stream + 1)
        if any(o.jitter) or o.randaugment[0]:
            numbers = np.concatenate([draws["jitter"], draws["randaugment"]], 1)
            each(lambda i: self._colour(images[i], numbers[i]), images)
        return images, maps

    def _bend(
        self, images: np.ndarray, maps: np.ndarray | None, places: np.ndarray, stream: int
    ) -> None:
        high, wide = images.shape[1:3]

        def bend(i: int) -> np.ndarray:
            numbers = noise(self.seed, int(places[i]), 2 * high * wide, stream)
            field = smooth_field(numbers.reshape(2, high, wide), *self.options.elastic)
            if maps is not None:
                maps[i] = warp_labels(maps[i], field)
            return warp(images[i], field)

        each(bend, images)

    def _colour(self, pixels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        o = self.options
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image = recolour(image, o.jitter, numbers[:4])
        image = randaugment(image, o.randaugment[1], numbers[4 : 4 + 2 * o.randaugment[0]])
        return np.asarray(image).reshape(pixels.shape)


def augment_pairs(
    images: np.ndarray, labels: np.ndarray, augment: Augment, seed: int, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Change pictures and the maps of their classes alike.

    Args:
        images: uint8 [B, H, W, C].
        labels: int32 [B, H, W].
        augment: how.
        seed: of the choices.
        places: [B], of which the choices are a function.

    Raises:
        FwError: an option that maps cannot have.

    >>> images = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    >>> new, maps = augment_pairs(
    ...     images, images[..., 0].astype(np.int32), Augment(turn=True), 0, np.array([3])
    ... )
    >>> bool((new[..., 0] == maps).all())
    True
    """
    arrays = {"images": images, "labels": labels}
    changed = augment.change(Rows(arrays, {}), seed)(arrays, places)
    return changed["images"], changed["labels"]
