"""Images: how they are resized and cropped, and what normalises them on the device.

`Images` have a class each; `segment` has those with one in every pixel. Both share
`fw.data.preprocess` and, for training, `fw.data.augment`; an artifact takes the bytes of images,
for the model normalises them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fw.data import preprocess
from fw.data.augment import Augment
from fw.data.encode import label_id
from fw.data.files import OnBadRow
from fw.data.image_folders import encode_pictures, load_pictures
from fw.data.pictures import decode, name, read_all
from fw.data.preprocess import Preprocessor
from fw.data.records import label_names
from fw.data.rows import Rows
from fw.errors import FwError
from fw.metrics.probabilities import one_label
from fw.options import read_fields
from fw.processors.outputs import outputs
from fw.processors.processor import Change, Processor
from fw.processors.records import with_dev

if TYPE_CHECKING:
    from fw.export.load import Artifact
    from fw.model import Model
    from fw.recipe import Finetune
    from fw.tasks import Task

GOLDEN_ROWS = 2
SMALL = 64
"""Images of at most this side get a ResNet without the reductions at its beginning."""

RESNET: Mapping[str, Any] = {
    "embedding_size": 64, "hidden_sizes": (64, 128, 256, 512), "depths": (2, 2, 2, 2),
    "layer_type": "basic", "stem": "imagenet",
}  # fmt: skip
SMALL_RESNET: Mapping[str, Any] = {
    "embedding_size": 32, "hidden_sizes": (64, 128, 256), "depths": (1, 1, 1),
    "layer_type": "basic", "stem": "small", "downsample_in_first_stage": True,
}  # fmt: skip
VIT: Mapping[str, Any] = {
    "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768,
}  # fmt: skip
PATCHES = (16, 14, 8, 7, 4, 2, 1)
"""Sides of a new ViT's patches, the first that divides the image's."""

MARGIN, BICUBIC = 32, 3
"""How EfficientNet-Lite's package resizes: to so many pixels more than it keeps, bicubic."""

SEEN = 2048
"""Images from which mean and spread are learnt."""


@dataclass(frozen=True, eq=False)
class OfImages(Processor):
    """What both kinds have in common.

    Attributes:
        preprocessor: of the model.
    """

    preprocessor: Preprocessor

    item: ClassVar[str] = "image"

    def adapt(self, model: Model) -> Model:
        """A model of uint8 `images`, which it normalises."""
        from fw.models.pixels import normalised

        own = self.preprocessor
        return normalised(model, own.mean, own.std, own.scale)

    def check(self, recipe: Finetune, rows: Mapping[str, Any], config: Any) -> None:
        """Refuses images that a pretrained model does not take."""
        self.fits(config, recipe.long_task)

    def fits(self, config: Any, task: str) -> None:
        """Refuses a model of other channels or another size."""
        if config.num_channels != self.preprocessor.channels:
            raise FwError(
                f"images: have {self.preprocessor.channels} channels; the model takes "
                f"{config.num_channels}"
            )
        size = None if getattr(config, "any_size", False) else getattr(config, "image", None)
        if size is not None and tuple(size) != self.preprocessor.shape[:2]:
            raise FwError(
                f"images: come out as {self.preprocessor.shape[:2]}; the model takes {tuple(size)}"
            )

    def specs(self, task: str) -> dict[str, jax.ShapeDtypeStruct]:
        """`images` uint8 [b, H, W, C]."""
        (b,) = export.symbolic_shape("b")
        return {"images": jax.ShapeDtypeStruct((b, *self.shape), jnp.uint8)}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what the exported function takes."""
        return self.preprocessor.shape

    def golden(self, task: str, examples: Sequence[Any] | None) -> dict[str, np.ndarray]:
        """Examples, or noise."""
        if examples is not None:
            return self.preprocessor.inputs(examples)
        rng = np.random.default_rng(0)
        return {"images": rng.integers(0, 256, (GOLDEN_ROWS, *self.shape), np.uint8)}

    def problem(self, item: Any, task: str) -> str:
        """Nothing that is no path, no bytes and no pixels; the rest shows when it is read."""
        if isinstance(item, str | Path | bytes):
            return ""
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim in (2, 3):
            return ""
        return f"expected a path, a file's bytes, or pixels as uint8; got {type(item).__name__}"

    def parse(self, line: str, where: str, task: str) -> Any:
        """A path."""
        return line.strip()

    def from_json(self, value: Any, where: str, task: str) -> Any:
        """The path of {"image": …}."""
        if isinstance(value, dict) and isinstance(value.get("image"), str):
            return value["image"]
        raise FwError(f'{where}: expected {{"image": path}}; got {json.dumps(value)[:200]}')


@dataclass(frozen=True, eq=False)
class Images(OfImages):
    """Images with a class each."""

    default: ClassVar[str] = "resnet"
    files: ClassVar[tuple[str, ...]] = (preprocess.FILE,)

    # --- learning ------------------------------------------------------------------------------

    @classmethod
    def read(cls, recipe: Finetune, dataset: Path) -> tuple[dict[str, list], tuple[str, ...]]:
        """Folders by class, tables of paths, IDX files."""
        skipped: list[str] = []
        bad = skipped.append if recipe.skip_bad_rows else None
        records = load_pictures(dataset, columns=recipe.names, on_bad_row=bad)
        return with_dev(records), tuple(skipped)

    @classmethod
    def fit(cls, recipe: Finetune, records: Mapping[str, list], source: Path | None) -> Self:
        """What a pretrained model has, or the mean and spread of the training images."""
        if source is not None:
            return cls(pretrained(source, recipe.size))
        sources = [picture.image for picture in records["train"]]
        return cls(fitted(sources, recipe.size, skip=recipe.skip_bad_rows))

    def labels(self, records: Sequence) -> tuple[str, ...]:
        """Every class of the training images."""
        return label_names(records)

    def task(self, recipe: Finetune, labels: tuple[str, ...]) -> Task:
        """Labels are smoothed as the recipe says."""
        from fw.tasks import image_classification

        return image_classification(labels, smoothing=recipe.smoothing)

    def rows(
        self,
        recipe: Finetune,
        records: Sequence,
        labels: tuple[str, ...],
        *,
        learn: bool,
        on_bad_row: OnBadRow = None,
    ) -> tuple[Rows, int]:
        """Images in memory, or decoded as they are asked for where they are too many."""
        return encode_pictures(self.preprocessor, records, labels, on_bad=on_bad_row), 0

    def try_rows(
        self,
        recipe: Finetune,
        records: Sequence,
        labels: tuple[str, ...],
        on_bad_row: OnBadRow = None,
    ) -> int:
        """Looks at the labels alone: images take long to decode."""
        ids = {label: i for i, label in enumerate(labels)}
        for record in records:
            label_id(record.label, record, ids)
        return 0

    def change(self, recipe: Finetune, rows: Any) -> Change | None:
        """The augmentation."""
        return Augment.parse(recipe.augment).change(rows, recipe.seed) if recipe.augment else None

    def config(self, recipe: Finetune, task: str, labels: tuple[str, ...]) -> Any:
        """A ResNet for small images or large ones, or a ViT."""
        from fw.models.resnet import ResNetConfig
        from fw.models.vit_config import ViTConfig

        height, width, channels = self.preprocessor.shape
        given = {"num_channels": channels, "num_labels": len(labels), "task": task}
        kind = ResNetConfig
        if recipe.model == "vit":
            kind, given["image_size"] = ViTConfig, (height, width)
        defaults = image_defaults(recipe.model, height, width)
        return read_fields(kind, recipe.config, defaults=defaults, **given)

    def summary(self, recipe: Finetune, rows: Any) -> str:
        """The size of an image."""
        height, width, channels = rows.arrays["images"].shape[1:]
        return f"{height} × {width} × {channels} pixels each"

    # --- answering -----------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: Path, notes: Mapping[str, Any]) -> Self:
        """All is in its file."""
        return cls(preprocess.load(folder))

    def save(self, folder: Path) -> None:
        """Writes `preprocessor_config.json`."""
        self.preprocessor.save(folder)

    def notes(self) -> dict[str, Any]:
        """The size of an image."""
        return {"image": self.preprocessor.shape}

    def answer(
        self, artifact: Artifact, items: Sequence[Any], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """{"image", "label", "score", "scores"} for each."""
        for start in range(0, len(items), batch_size):
            some = items[start : start + batch_size]
            found = outputs(artifact, self.preprocessor.inputs(some), batch_size)
            for item, logits in zip(some, found, strict=True):
                yield {"image": name(item), **one_label(logits, artifact.labels)}

    def say(self, answer: Mapping[str, Any]) -> str:
        """The class, and the image it is of."""
        return f"{answer['label']} {answer['score']:.2f}  {answer['image']}"


def image_defaults(model: str, height: int, width: int) -> Mapping[str, Any]:
    """What a new "vit" or "resnet" for images of a size has, where nothing is said.

    >>> image_defaults("vit", 28, 28)["patch_size"]
    14
    """
    if model == "vit":
        patch = next(p for p in PATCHES if height % p == 0 and width % p == 0)
        return {**VIT, "patch_size": patch}
    return RESNET if max(height, width) > SMALL else SMALL_RESNET


def pretrained(source: Path, size: int) -> Preprocessor:
    """What the folder of a pretrained model says, or what fw knows of its family.

    Raises:
        FwError: neither is known, or another size is asked for.
    """
    if size:
        raise FwError(f"size is {size}, but a pretrained model has a size of its own; leave it out")
    if (source / preprocess.FILE).is_file():
        return preprocess.load(source)
    from fw.hub.source import open_model
    from fw.models.efficientnet import MEAN, STD, EfficientNetConfig

    with open_model(source) as (where, config, _):
        if config.get("model_type") != EfficientNetConfig.model_type:
            raise FwError(f"{where}: expected {preprocess.FILE} beside it; found none")
        side = config["image_size"]
    return Preprocessor(side + MARGIN, (side, side), BICUBIC, MEAN, STD)


def fitted(
    sources: Sequence[Any], size: int, *, alike: bool = True, skip: bool = False
) -> Preprocessor:
    """The size, channels, mean and spread of a model that is trained from nothing.

    Args:
        sources: the training images; some of them are looked at, one in each thread at a time.
        size: the side of a square that all are resized to; 0 if they have one size already.
        alike: whether they must have one size then.
        skip: leave bad ones out; `rows` tells of them.

    Raises:
        FwError: a bad image, none that is good, or images of several sizes, and none is stated.
    """

    def look(source: Any) -> tuple[np.ndarray, tuple[int, ...], bool]:
        image = decode(source, 3)
        grey = bool((image == image[..., :1]).all())
        return preprocess.levels(image), image.shape[:2], grey

    places = np.linspace(0, len(sources) - 1, min(len(sources), SEEN)).round().astype(int)
    counts, shapes, grey = np.zeros((3, 256), np.int64), set(), True
    chosen = [sources[i] for i in places]
    bad: list[str] = []
    for _, (found, shape, plain) in read_all(chosen, look, on_bad=bad.append if skip else None):
        counts += found
        shapes.add(shape)
        grey &= plain
    if not shapes:
        raise FwError(f"images: none of the training images is good; {''.join(bad[:1])}")
    if alike and not size and len(shapes) > 1:
        raise FwError(f"images: have {len(shapes)} sizes, such as {sorted(shapes)[:2]}; give size")
    side = (size, size) if size else sorted(shapes)[0]
    return preprocess.of_levels(counts[: 1 if grey else 3], side)
