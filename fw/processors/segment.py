"""Images with a class in every pixel: squares to learn from, images of any size to answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from fw.data import preprocess, segments
from fw.data.augment import Augment
from fw.data.files import OnBadRow
from fw.data.pictures import PIXELS, decode, name
from fw.data.preprocess import Preprocessor
from fw.data.rows import Rows
from fw.data.segments import Crops, Palette, Segmented
from fw.errors import FwError
from fw.labels import IGNORE
from fw.metrics.probabilities import softmax
from fw.options import parted, read_fields
from fw.processors.image import OfImages, fitted
from fw.processors.processor import Change
from fw.tiles import tiled

if TYPE_CHECKING:
    from fw.export.load import Artifact
    from fw.recipe import Finetune

SIDE = 256
"""Of the squares that images are cut into, if nothing is said."""
UNET: Mapping[str, Any] = {"width": 16}
"""What a new U-Net has, where nothing is said."""


@dataclass(frozen=True, eq=False)
class Segments(OfImages):
    """Images with a class in every pixel.

    Attributes:
        preprocessor: of the model; it leaves the size of an image alone.
        palette: what values of a map are which classes.
        tile: the side of the squares that the exported function takes.
        multiple: of which sides are multiples.
    """

    palette: Palette
    tile: int
    multiple: int

    default: ClassVar[str] = "unet"
    files: ClassVar[tuple[str, ...]] = (preprocess.FILE, segments.FILE)

    # --- learning ------------------------------------------------------------------------------

    @classmethod
    def read(cls, recipe: Finetune, dataset: Path) -> tuple[dict[str, list], tuple[str, ...]]:
        """Folders `image` and `label`."""
        return {s: pairs for s, pairs in segments.find_pairs(dataset).items() if pairs}, ()

    @classmethod
    def fit(cls, recipe: Finetune, records: Mapping[str, list], source: Path | None) -> Self:
        """The palette of the training maps, and the mean and spread of the images."""
        if source is not None:
            raise FwError(f"model {recipe.model!r} segments nothing; choose unet")
        names = parted(recipe.classes) or None
        pairs = records["train"]
        ignore = recipe.ignore if recipe.ignore >= 0 else None
        bad = (lambda _: None) if recipe.skip_bad_rows else None  # `rows` tells of them
        palette = segments.fit(pairs, names, ignore, on_bad=bad)
        sources = [pair.image for pair in pairs]
        made = fitted(sources, 0, alike=False, skip=recipe.skip_bad_rows)
        own = Preprocessor(None, mean=made.mean, std=made.std)
        multiple = _multiple(recipe.config)
        side = recipe.size or SIDE
        if side % multiple:
            raise FwError(f"size is {side}; expected a multiple of {multiple} for this U-Net")
        return cls(own, palette, side, multiple)

    def labels(self, records: Sequence) -> tuple[str, ...]:
        """The classes of the palette."""
        return self.palette.names

    def rows(
        self,
        recipe: Finetune,
        records: Sequence,
        labels: tuple[str, ...],
        *,
        learn: bool,
        on_bad_row: OnBadRow = None,
    ) -> tuple[Rows, int]:
        """To learn from, squares cut out of the images; to judge by, whole images."""
        channels = self.preprocessor.channels
        items = segments.read_pairs(records, self.palette, channels, on_bad=on_bad_row)
        if not learn:
            return segments.whole_rows(items, self.multiple), 0
        crops = Crops(items, (self.tile, self.tile), recipe.seed)
        empty = {"images": 0, "labels": IGNORE}
        return _CropRows(crops.arrays, empty, items=items), 0

    def change(self, recipe: Finetune, rows: Any) -> Change | None:
        """Where a square lies, and the augmentation of it."""
        then = None
        if recipe.augment:
            then = Augment.parse(recipe.augment).change(rows, recipe.seed)
        return Crops(rows.items, (self.tile, self.tile), recipe.seed, then)

    def config(self, recipe: Finetune, task: str, labels: tuple[str, ...]) -> Any:
        """A U-Net."""
        from fw.models.unet import UNetConfig

        return read_fields(
            UNetConfig, recipe.config, defaults=UNET,
            num_channels=self.preprocessor.channels, num_labels=len(labels), task=task,
        )  # fmt: skip

    def summary(self, recipe: Finetune, rows: Any) -> str:
        """The size of a square."""
        return f"squares of {self.tile} × {self.tile} pixels"

    # --- answering -----------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: Path, notes: Mapping[str, Any]) -> Self:
        """The side of a square is in the notes, or follows from a run's options."""
        if "tile" in notes:
            tile, multiple = notes["tile"], notes.get("multiple")
        else:
            multiple = _multiple(str(notes.get("config", "")))
            tile = notes.get("size") or SIDE
        sides = [n for n in (tile, multiple) if type(n) is int and 0 < n <= PIXELS**0.5]
        if len(sides) < 2 or sides[0] % sides[1]:
            raise FwError(f"{folder}: the processor's notes: 'tile': expected a number of pixels")
        return cls(preprocess.load(folder), segments.load(folder), *sides)

    def save(self, folder: Path) -> None:
        """Writes its files."""
        self.preprocessor.save(folder)
        self.palette.save(folder)

    def notes(self) -> dict[str, Any]:
        """The side of a square."""
        return {"tile": self.tile, "multiple": self.multiple}

    @property
    def shape(self) -> tuple[int, int, int]:
        """A square's."""
        return (self.tile, self.tile, self.preprocessor.channels)

    def answer(
        self, artifact: Artifact, items: Sequence[Any], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """{"image", "classes": int[H, W], "shares"}: lists of ids, and each class's share."""

        def squares(images: np.ndarray) -> np.ndarray:
            return softmax(artifact.logits({"images": images})).astype(np.float32)

        for item in items:
            image = decode(item, self.preprocessor.channels)
            overlap = min(self.tile // 4, self.tile - self.multiple)
            found = tiled(
                squares, image, size=(self.tile, self.tile), overlap=overlap,
                multiple=self.multiple, batch_size=min(batch_size, 4),
            )  # fmt: skip
            classes = found.argmax(-1)
            shares = np.bincount(classes.ravel(), minlength=len(artifact.labels)) / classes.size
            yield {
                "image": name(item),
                "classes": classes.tolist(),
                "shares": dict(zip(artifact.labels, shares.tolist(), strict=True)),
            }

    def say(self, answer: Mapping[str, Any]) -> str:
        """Each class's share of the image."""
        shares = "  ".join(f"{label} {share:.1%}" for label, share in answer["shares"].items())
        return f"{answer['image']}: {shares}"


@dataclass(frozen=True, eq=False)
class _CropRows(Rows):
    """Rows that `Crops` makes of whole images."""

    items: Sequence[Segmented] = ()


def _multiple(config: str) -> int:
    """Of which sides are multiples for a U-Net of these options."""
    from fw.models.unet import UNetConfig

    return read_fields(UNetConfig, config, num_labels=2).multiple
