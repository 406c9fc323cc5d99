"""Pictures of any size become the model's pixels, as its `preprocessor_config.json` says.

`load` reads what transformers writes, for the image processors in `PROCESSORS`; what is left is one
record of what is done, whoever's it was: resize, crop, and the numbers that normalise. The first
two are done here, by Pillow, on uint8, bit for bit as transformers' processors for Pillow (12) do;
the numbers go to the device with the model, see `fw.models.pixels.normalised`. `save` writes the
record as a BitImageProcessor, the processor that can spell all of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fw.data.pictures import MODES, PIXELS, Source, decode, in_threads, name
from fw.errors import FwError
from fw.json_files import read_json, write_json

FILE = "preprocessor_config.json"
"""Its name in a model's folder."""

SIDE = 2**14
"""The longest side that a picture may be made."""

RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's filters, by the number that config files give them."""

HALF, IMAGENET_MEAN, IMAGENET_STD = (0.5,) * 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_COMMON: Mapping[str, Any] = {
    "do_resize": True, "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "resample": 3, "image_mean": HALF, "image_std": HALF,
    "crop_size": {"height": 224, "width": 224},
}  # fmt: skip
PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "ViT": {"size": {"height": 224, "width": 224}, "resample": 2},
    "DeiT": {"size": {"height": 256, "width": 256}, "do_center_crop": True},
    "Bit": {
        "size": {"shortest_edge": 224}, "do_center_crop": True,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),  # CLIP's
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    "ConvNext": {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256},
    "EfficientNet": {
        "size": {"height": 346, "width": 346}, "crop_size": {"height": 289, "width": 289},
        "rescale_offset": False, "include_top": True,
    },
}  # fmt: skip
"""What each processor of transformers does where its file says nothing, beside `_COMMON`. DINOv2's
are Bit's, ResNet's are ConvNext's."""

WARPED = 384
"""From this size on, ConvNext's processor makes the picture square and crops nothing."""


@dataclass(frozen=True)
class Preprocessor:
    """What is done to a picture before a model sees it: resize, crop, (x·scale - mean) / std.

    Args:
        size: (height, width); a number for the shorter edge, the other one in proportion; None
            leaves a picture as it is.
        crop: (height, width) of the middle that is kept; what is missing there is black.
        resample: how, by Pillow's number: see `RESAMPLE`.
        mean, std: C numbers each, 3 for colours and 1 for grey, of the scaled pixels.
        scale: of the pixels.

    Raises:
        FwError: a size, a filter or a number that makes no sense.

    >>> made = Preprocessor(size=4, crop=(4, 4))
    >>> made.pixels(np.zeros((20, 10, 3), np.uint8)).shape, made.shape
    ((4, 4, 3), (4, 4, 3))
    """

    size: tuple[int, int] | int | None = (224, 224)
    crop: tuple[int, int] | None = None
    resample: int = 2
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    scale: float = 1 / 255

    def __post_init__(self) -> None:
        """Check every number."""
        sides = [self.size] if isinstance(self.size, int) else [*(self.size or ())]
        for side in (*sides, *(self.crop or ())):
            if not _whole(side) or not 1 <= side <= SIDE:
                raise FwError(f"size, crop: expected sides of 1 … {SIDE}; got {side!r}")
        if not _whole(self.resample) or not 0 <= self.resample < len(RESAMPLE):
            raise FwError(f"resample: expected 0 … {len(RESAMPLE) - 1}; got {self.resample!r}")
        if len(self.mean) not in MODES or len(self.std) != len(self.mean):
            raise FwError(
                "mean, std: expected a number for grey or for each of three colours; got "
                f"{list(self.mean)[:5]} and {list(self.std)[:5]}"
            )
        if not all(_real(x) for x in (self.scale, *self.mean, *self.std)) or min(self.std) <= 0:
            raise FwError("mean, std, scale: expected finite numbers, and std above 0")

    @property
    def channels(self) -> int:
        """3 for colours, 1 for grey."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what comes out.

        Raises:
            FwError: that depends on the picture.
        """
        made = self.crop or self.size
        if not isinstance(made, tuple):
            raise FwError("size: pictures come out in different sizes; give crop, or both sides")
        return (*made, self.channels)

    def pixels(self, source: Source) -> np.ndarray:
        """Decode, resize and crop a picture.

        Args:
            source: see `fw.data.pictures.decode`.

        Returns:
            uint8 [H, W, C].

        Raises:
            FwError: no whole picture, or one so long that resizing makes a giant of it, if only on
                the way.
        """
        pixels = decode(source, self.channels)
        if self.size is not None:
            pixels = self._resized(pixels, source)
        return pixels if self.crop is None else _middle(pixels, *self.crop)

    def inputs(self, items: Sequence[Source]) -> dict[str, np.ndarray]:
        """What the model takes, for answering.

        Args:
            items: pictures, as for `pixels`.

        Returns:
            `images`, uint8 [B, H, W, C].

        Raises:
            FwError: a bad picture, or sizes that depend on it.

        >>> Preprocessor((2, 2)).inputs([np.zeros((5, 4), np.uint8)])["images"].shape
        (1, 2, 2, 3)
        """
        images = np.empty((len(items), *self.shape), np.uint8)
        for at, pixels in enumerate(in_threads(self.pixels, items)):
            images[at] = pixels
        return {"images": images}

    def save(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json`, which transformers reads, too.

        Raises:
            FwError: it cannot be written.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Preprocessor(size=256, crop=(224, 224)).save(folder)
        ...     load(folder).size
        256
        """
        settings = {
            "image_processor_type": "BitImageProcessor",
            "do_resize": self.size is not None,
            "do_center_crop": self.crop is not None,
            "do_convert_rgb": self.channels == 3,
            "do_rescale": True,
            "do_normalize": True,
            "resample": self.resample,
            "rescale_factor": self.scale,
            "image_mean": self.mean,
            "image_std": self.std,
        }
        if self.size is not None:
            settings["size"] = (
                {"shortest_edge": self.size} if isinstance(self.size, int) else _sides(self.size)
            )
        if self.crop is not None:
            settings["crop_size"] = _sides(self.crop)
        write_json(Path(folder) / FILE, settings)

    def _resized(self, pixels: np.ndarray, source: Source) -> np.ndarray:
        height, width = pixels.shape[:2]
        if isinstance(self.size, int):
            long = int(self.size * max(height, width) / min(height, width))
            high, wide = (long, self.size) if width <= height else (self.size, long)
        else:
            high, wide = self.size or (height, width)
        if (high, wide) == (height, width):
            return pixels
        if max(height, high) * wide > PIXELS:
            raise FwError(
                f"{name(source)}: {height} × {width} pixels would be resized to {height} × {wide}, "
                f"and then to {high} × {wide}, and at most {PIXELS} pixels may be"
            )
        image = Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels)
        # Width first, as Pillow did until 13, which begins with the height where that is cheaper.
        # What lies between is rounded and clipped, so the order is seen in the result.
        how = Image.Resampling(self.resample)
        resized = image.resize((wide, height), how).resize((wide, high), how)
        return np.array(resized).reshape(high, wide, self.channels)


def load(folder: str | Path) -> Preprocessor:
    """Read the preprocessor of a model's folder.

    Args:
        folder: holds `preprocessor_config.json`, as transformers or `save` wrote it.

    Returns:
        The record; what EfficientNet's processor adds and divides by besides is in mean and std.

    Raises:
        FwError: no such file, a processor that is not in `PROCESSORS`, or a value of another type
            or range than its.
    """
    path = Path(folder) / FILE
    found = read_json(path)
    try:
        return _parse(found if isinstance(found, dict) else {})
    except FwError as error:
        raise FwError(f"{path}: {error}") from None


def levels(images: np.ndarray) -> np.ndarray:
    """How often each level occurs: of uint8 [..., C], int64 [C, 256]; those of parts add up.

    >>> levels(np.array([[0], [255], [255]], np.uint8))[0, [0, 255]].tolist()
    [1, 2]
    """
    channels = np.moveaxis(images, -1, 0)
    return np.stack([np.bincount(one.ravel(), minlength=256) for one in channels])


def of_levels(counts: np.ndarray, size: tuple[int, int]) -> Preprocessor:
    """A preprocessor for a model that is trained from nothing: mean and spread are the data's own.

    Args:
        counts: int [C, 256], the `levels` of the images to train on.
        size: (height, width) that they have or get.

    >>> of_levels(levels(np.array([[0], [255]], np.uint8)), (1, 1)).mean
    (0.5,)
    """
    values, shares = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
    means = shares @ values
    spreads = np.sqrt(((values - means[:, None]) ** 2 * shares).sum(1))
    std = np.maximum(spreads, 1 / 255)
    return Preprocessor(size, mean=tuple(means.tolist()), std=tuple(std.tolist()))


def _parse(found: Mapping[str, Any]) -> Preprocessor:
    kind = found.get("image_processor_type", found.get("feature_extractor_type"))
    family = kind if isinstance(kind, str) else ""
    for end in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        family = family.removesuffix(end)
    if family not in PROCESSORS:
        known = ", ".join(f"{name}ImageProcessor" for name in PROCESSORS)
        raise FwError(f"image_processor_type is {str(kind)[:100]!r}; expected one of {known}")
    known = {**_COMMON, **PROCESSORS[family]}
    said = {key: value if found.get(key) is None else found[key] for key, value in known.items()}
    for key, value in known.items():
        if isinstance(value, bool) and not isinstance(said[key], bool):
            raise FwError(f"{key}: expected true or false; got {str(said[key])[:100]}")
    if found.get("do_pad") or (family == "ConvNext" and said["do_center_crop"]):
        raise FwError("do_pad, and ConvNext's do_center_crop, are not supported")

    size = crop = None
    if said["do_resize"]:
        size = _size("size", said["size"], square=family not in ("Bit", "ConvNext"))
        if family == "ConvNext":
            size, crop = _convnext(size, said["crop_pct"])
    if said["do_center_crop"]:
        crop = _size("crop_size", said["crop_size"], square=True)
        if isinstance(crop, int):
            raise FwError("crop_size: expected height and width; got shortest_edge")
    mean, std = (_numbers(key, said[key]) for key in ("image_mean", "image_std"))
    channels = max(len(mean), len(std))
    mean, std = mean * (channels // len(mean)), std * (channels // len(std))
    again = std if said.get("include_top") else (1.0,) * len(std)
    if not said["do_normalize"]:
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    if said.get("rescale_offset"):
        mean = tuple(m + 1 for m in mean)
    std = tuple(s * t for s, t in zip(std, again, strict=True))
    scale = said["rescale_factor"] if said["do_rescale"] else 1.0
    return Preprocessor(size, crop, said["resample"], mean, std, scale)


def _size(key: str, value: Any, *, square: bool) -> tuple[int, int] | int:
    """Sides, or the shorter edge alone, which is what a bare number means to some processors."""
    match value:
        case int() if _whole(value):
            return (value, value) if square else value
        case {"height": height, "width": width} if len(value) == 2:
            sides = (height, width)
        case {"shortest_edge": edge} if len(value) == 1:
            sides = (edge,)
        case [height, width]:
            sides = (height, width)
        case _:
            sides = ()
    if not sides or not all(map(_whole, sides)):
        raise FwError(
            f"{key}: expected a number, height and width, or shortest_edge; got {str(value)[:100]}"
        )
    return sides if len(sides) == 2 else sides[0]


def _convnext(size: tuple[int, int] | int, share: Any) -> tuple[Any, tuple[int, int] | None]:
    """Resize more than is wanted and keep the middle; large ones are only made square."""
    if not isinstance(size, int):
        raise FwError("size: expected shortest_edge for ConvNextImageProcessor")
    if size >= WARPED:
        return (size, size), None
    if not _real(share) or not 0 < share <= 1:
        raise FwError(f"crop_pct: expected a share in 0 … 1; got {str(share)[:100]}")
    return int(min(size / share, 2.0 * SIDE)), (size, size)


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    values = [value] if _real(value) else value
    if (
        not isinstance(values, list | tuple)
        or len(values) not in MODES
        or not all(map(_real, values))
    ):
        raise FwError(
            f"{key}: expected a number for each of 1 or 3 channels; got {str(value)[:100]}"
        )
    # One number is for all colours; a list of one is grey.
    return tuple(map(float, values)) * (3 if values is not value else 1)


def _middle(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle, with black around what is too small."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    kept = pixels[max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    if kept.shape[:2] == (height, width):
        return np.ascontiguousarray(kept)
    out = np.zeros((height, width, pixels.shape[2]), np.uint8)
    y, x = max(-top, 0), max(-left, 0)
    out[y : y + kept.shape[0], x : x + kept.shape[1]] = kept
    return out


def _sides(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
