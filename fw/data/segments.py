"""Pictures with a map of classes each: folders `image` and `label` with the same names in them.

Names are the same whatever they end in: `image/1.jpg` goes with `label/1.png`. Pictures may differ
in size. To learn from, `Crops` cuts a window out of each, anew for every place in the stream of
rows; to be judged by, `whole_rows` lays those of a batch out in one size, where what is added is
not counted. `pictures` decodes, `preprocess` knows the numbers that normalise, and a `Palette` says
which value of a map is which class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fw.data.draws import uniform
from fw.data.files import OnBadRow, refuse
from fw.data.pictures import BAD, decode, decode_labels, read_all
from fw.data.rows import Rows
from fw.data.splits import SPLITS, split_by_hash, split_named
from fw.errors import FwError
from fw.json_files import read_json, write_json
from fw.labels import IGNORE

FILE = "palette.json"
"""The name of a palette in a model's folder."""

IMAGE, LABEL = ("image", "images"), ("label", "labels", "mask", "masks")
"""What the two folders may be called."""

STREAM = 4
"""Of random numbers; `augment` has those below."""

MOST = 256
"""Values in the maps of a data set; where there are more, they are no classes."""


class Pair(NamedTuple):
    """Where a picture and its map of classes are."""

    image: Path
    label: Path


class Segmented(NamedTuple):
    """A picture, uint8 [H, W, C], and the classes of its pixels, int16 [H, W]."""

    image: np.ndarray
    labels: np.ndarray


def find_pairs(folder: str | Path) -> dict[str, list[Pair]]:
    """Find the pairs of each split.

    A folder with `image` and `label` in it is split by a hash of the files' names. Else there is a
    folder of that kind for each split, with train, dev (or val) or test in its name; without dev,
    the tenth of train that `split_by_hash` calls "dev" is.

    Args:
        folder: of the data set.

    Returns:
        the pairs of each split, in the order of their names.

    Raises:
        FwError: no such folders, a picture without a map or the other way round, two files of one
            name, or nothing to train on.

    >>> find_pairs("nowhere")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: nowhere: expected a folder 'image' and a folder 'label'...
    """
    folder = Path(folder)
    found: dict[str, list[Pair]] = {}
    if (pairs := _pairs(folder)) is not None:
        found = {split: [] for split in SPLITS}
        for pair in pairs:
            found[split_by_hash(pair.image.name)].append(pair)
    else:
        for inner in sorted(folder.iterdir()) if folder.is_dir() else ():
            split = split_named(inner.name)
            if split is None or (pairs := _pairs(inner)) is None:
                continue
            if split in found:
                raise FwError(f"{folder}: expected one folder for {split}; {inner} is another")
            found[split] = pairs
        if "train" in found and "dev" not in found:
            everyone = found["train"]
            found |= {"train": [], "dev": []}
            for pair in everyone:
                split = "dev" if split_by_hash(pair.image.name) == "dev" else "train"
                found[split].append(pair)
    if not found:
        raise FwError(
            f"{folder}: expected a folder 'image' and a folder 'label' in it, or in folders for "
            "train, dev and test"
        )
    if not found.get("train"):
        raise FwError(f"{folder}: expected a picture to train on; found none")
    return found


def read_pairs(
    pairs: Sequence[Pair],
    palette: "Palette",
    channels: int,
    *,
    on_bad: OnBadRow = None,
    most: float = BAD,
) -> list[Segmented]:
    """Read pictures and their maps; they stay in memory.

    Args:
        pairs: from `find_pairs`.
        palette: from `fit`.
        channels: of the pictures, 1 for grey or 3.
        on_bad: gets the message of each pair left out; None raises instead.
        most: the share of all that may be left out.

    Raises:
        FwError: as `fw.data.pictures.read_all`; a map of another size than its picture, or with a
            value that the palette lacks.
    """

    def make(pair: Pair) -> Segmented:
        image, values = decode(pair.image, channels), decode_labels(pair.label)
        if image.shape[:2] != values.shape:
            raise FwError(f"{pair.label}: {values.shape}, and its picture is {image.shape[:2]}")
        return Segmented(image, palette.classes(values, str(pair.label)))

    return [made for _, made in read_all(pairs, make, on_bad=on_bad, most=most)]


@dataclass(frozen=True)
class Palette:
    """Which value of a map is which class; made by `fit`, kept with the model.

    Args:
        values: of the classes, by id.
        names: of the classes, by id.
        ignore: the value of pixels that are not counted, such as 255 in PASCAL VOC; None for none.

    Raises:
        FwError: no class, more than int16 counts, one value for two, or another number of names.

    >>> palette = Palette((0, 255), ("membrane", "cell"))
    >>> palette.classes(np.array([[255, 0]])).tolist()
    [[1, 0]]
    """

    values: tuple[int, ...]
    names: tuple[str, ...]
    ignore: int | None = None

    def __post_init__(self) -> None:
        """Check what the look-up relies on."""
        if len(self.values) > 2**15:
            raise FwError(f"palette: expected at most {2**15} classes; got {len(self.values)}")
        numbers = [*self.values, *([] if self.ignore is None else [self.ignore])]
        whole = all(type(v) is int and 0 <= v < 2**16 for v in numbers)
        if not self.values or not whole or len(set(numbers)) < len(numbers):
            raise FwError(
                f"palette: expected different values in 0 … 65535, got {str(numbers)[:80]}"
            )
        texts = all(isinstance(name, str) and name for name in self.names)
        if (
            not texts
            or len({*self.names}) != len(self.names)
            or len(self.names) != len(self.values)
        ):
            raise FwError(
                f"palette: expected {len(self.values)} different names, got {str(self.names)[:80]}"
            )

    def classes(self, values: np.ndarray, path: str = "map") -> np.ndarray:
        """The class of each pixel.

        Args:
            values: int[H, W], from `fw.data.pictures.decode_labels`.
            path: what an error calls it.

        Returns:
            int16[H, W], `IGNORE` where none is counted.

        Raises:
            FwError: a value that is no class.
        """
        table = np.full(max(*self.values, self.ignore or 0, int(values.max())) + 1, -2, np.int16)
        table[list(self.values)] = np.arange(len(self.values))
        if self.ignore is not None:
            table[self.ignore] = IGNORE
        found = table[values]
        if (found == -2).any():
            odd = int(values[found == -2][0])
            raise FwError(
                f"{path}: value {odd} is none of the classes {', '.join(map(str, self.values))}"
            )
        return found

    def paint(self, classes: np.ndarray) -> np.ndarray:
        """Values for classes: the map that was learnt from, for the answer.

        Args:
            classes: int[...] in 0 … C - 1.

        >>> Palette((0, 255), ("membrane", "cell")).paint(np.array([1, 0])).tolist()
        [255, 0]
        """
        dtype = np.uint8 if max(self.values) < 256 else np.uint16
        return np.asarray(self.values, dtype)[classes]

    def save(self, folder: str | Path) -> None:
        """Write `palette.json`.

        Raises:
            FwError: it cannot be written.
        """
        write_json(Path(folder) / FILE, self)


def load(folder: str | Path) -> Palette:
    """Read what `Palette.save` wrote.

    Raises:
        FwError: no such file, or not a palette.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Palette((3, 7), ("a", "b"), ignore=255).save(folder)
    ...     load(folder)
    Palette(values=(3, 7), names=('a', 'b'), ignore=255)
    """
    path = Path(folder) / FILE
    found = read_json(path)
    if not isinstance(found, dict) or set(found) != {"values", "names", "ignore"}:
        raise FwError(f"{path}: expected an object of values, names and ignore")
    if not all(isinstance(found[key], list) for key in ("values", "names")):
        raise FwError(f"{path}: expected lists of values and names")
    try:
        return Palette(tuple(found["values"]), tuple(found["names"]), found["ignore"])
    except FwError as error:
        raise FwError(f"{path}: {error}") from None


def fit(
    pairs: Sequence[Pair],
    names: Sequence[str] | None = None,
    ignore: int | None = None,
    *,
    on_bad: OnBadRow = None,
    most: float = BAD,
) -> Palette:
    """The palette of maps: their distinct values, in order.

    Args:
        pairs: those to learn from.
        names: of the classes; the values themselves, if None.
        ignore: as for `Palette`.
        on_bad: gets the message of each map left out; None raises instead.
        most: the share of all that may be left out.

    Raises:
        FwError: as `fw.data.pictures.read_all`; no good map, more than `MOST` values, or what
            `Palette` refuses.
    """
    values: set[int] = set()
    bad: list[str] = []

    def tell(message: str) -> None:
        bad.append(message)
        refuse(message, on_bad)

    def look(pair: Pair) -> np.ndarray:
        return np.unique(decode_labels(pair.label))

    for at, found in read_all(pairs, look, on_bad=tell, most=most):
        values.update(found.tolist())
        if len(values) > MOST:
            raise FwError(
                f"{pairs[at].label}: expected the number of a class in each pixel; the maps have "
                f"more than {MOST} values"
            )
    if not values:
        raise FwError(f"maps: none of the training maps is good; {''.join(bad[:1])}")
    known = tuple(sorted(values - {ignore}))
    return Palette(known, tuple(map(str, known)) if names is None else tuple(names), ignore)


@dataclass(frozen=True, eq=False)
class _Uncut:
    """Stands for rows that `Crops` makes: indexed, it gives the numbers of the pictures."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.arange(len(self))[rows]


@dataclass(frozen=True, eq=False)
class _Padded(_Uncut):
    """Arrays of several sizes as one, whose rows are padded when they are asked for."""

    make: Callable[[int], np.ndarray]

    def __getitem__(self, rows: Any) -> np.ndarray:
        chosen = super().__getitem__(rows)
        if chosen.ndim == 0:
            return self.make(int(chosen)).astype(self.dtype)
        out = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        for at, row in enumerate(chosen.tolist()):
            out[at] = self.make(row)
        return out


@dataclass(frozen=True, eq=False)
class Crops:
    """Windows of pictures, each at a place of its own; `Batches(crops.arrays, ..., change=crops)`.

    Where a window lies is a function of the seed and of the row's place in the stream. A picture
    smaller than the window is reflected at its lower and right edges, where no pixel is counted.

    Args:
        items: from `read_pairs`.
        size: height and width of a window.
        seed: of the places, in 0 … 2⁶⁴ - 1.
        then: what is done to the windows afterwards, as `Batches` has it: flips, deformations.

    Raises:
        FwError: no picture, or a size below 1.

    >>> from fw.data.batches import Batches
    >>> picture = Segmented(np.zeros((5, 9, 1), np.uint8), np.zeros((5, 9), np.int16))
    >>> crops = Crops([picture], (4, 4))
    >>> batch = Batches(crops.arrays, 2, change=crops)(0)
    >>> batch["images"].shape, batch["labels"].shape
    ((2, 4, 4, 1), (2, 4, 4))
    """

    items: Sequence[Segmented]
    size: tuple[int, int]
    seed: int = 0
    then: Callable[[dict[str, np.ndarray], np.ndarray], dict[str, np.ndarray]] | None = None

    def __post_init__(self) -> None:
        """Refuse what nothing can be cut out of."""
        if not self.items or min(self.size) < 1:
            raise FwError(
                f"crops: {len(self.items)} pictures and windows of {self.size}; expected at least "
                "one of one pixel"
            )

    @property
    def arrays(self) -> dict[str, Any]:
        """What rows will be: `images` uint8 [R, h, w, C] and `labels` int32 [R, h, w]."""
        rows, channels = len(self.items), self.items[0].image.shape[2]
        return {
            "images": _Uncut((rows, *self.size, channels), np.dtype(np.uint8)),
            "labels": _Uncut((rows, *self.size), np.dtype(np.int32)),
        }

    def __call__(
        self, taken: Mapping[str, np.ndarray], places: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Cut windows.

        Args:
            taken: `images` int [B], numbers of pictures, as `arrays` gives them.
            places: int64 [B], the place of each row in the stream.

        Returns:
            `images` uint8 [B, h, w, C], `labels` int32 [B, h, w].
        """
        numbers = uniform(self.seed, places, 2, STREAM)
        cut = [
            self._cut(self.items[row], where)
            for row, where in zip(taken["images"].tolist(), numbers, strict=True)
        ]
        made = {"images": np.stack([c.image for c in cut])}
        made["labels"] = np.stack([c.labels for c in cut], dtype=np.int32)
        return made if self.then is None else self.then(made, places)

    def _cut(self, item: Segmented, where: np.ndarray) -> Segmented:
        least = [max(n, s) for n, s in zip(item.labels.shape, self.size, strict=True)]
        image, labels = _reflected(item.image, least), _uncounted(item.labels, least)
        room = np.array(labels.shape) - self.size + 1
        top, left = (where * room).astype(int).tolist()
        window = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        return Segmented(image[window], labels[window])


def whole_rows(items: Sequence[Segmented], multiple: int = 1) -> Rows:
    """Whole pictures in one size, the least that all fit in; each is padded when it is asked for.

    Args:
        items: from `read_pairs`.
        multiple: of which height and width are multiples, see `UNetConfig.multiple`.

    Returns:
        `images` uint8 [R, H, W, C], reflected at their lower and right edges, and `labels` int32
        [R, H, W], `IGNORE` there; both to be indexed, as `fw.data.pictures.Decoded` is.

    Raises:
        FwError: no picture.

    >>> small = Segmented(np.zeros((3, 4, 1), np.uint8), np.zeros((3, 4), np.int16))
    >>> whole_rows([small], 4).arrays["labels"][0][:, 0].tolist()
    [0, 0, 0, -1]
    """
    if not items:
        raise FwError("segmentation: expected at least one picture; found none")
    sides = [max(item.labels.shape[i] for item in items) for i in range(2)]
    size = [-(-side // multiple) * multiple for side in sides]
    shape = (len(items), *size)
    arrays: dict[str, Any] = {
        "images": _Padded(
            (*shape, items[0].image.shape[2]),
            np.dtype(np.uint8),
            lambda row: _reflected(items[row].image, size),
        ),
        "labels": _Padded(
            shape, np.dtype(np.int32), lambda row: _uncounted(items[row].labels, size)
        ),
    }
    return Rows(arrays, {"images": 0, "labels": IGNORE})


def _reflected(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    return np.pad(image, [*_more(image, size), (0, 0)], mode="reflect")


def _uncounted(labels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    return np.pad(labels, _more(labels, size), constant_values=IGNORE)


def _more(array: np.ndarray, size: Sequence[int]) -> list[tuple[int, int]]:
    return [(0, new - old) for new, old in zip(size, array.shape[:2], strict=True)]


def _pairs(folder: Path) -> list[Pair] | None:
    """The pairs of a folder; None if it has no folders of the two names."""
    images, labels = (
        next((folder / name for name in names if (folder / name).is_dir()), None)
        for names in (IMAGE, LABEL)
    )
    if images is None or labels is None:
        return None
    ours, theirs = _by_stem(images), _by_stem(labels)
    if alone := sorted(ours.keys() ^ theirs.keys()):
        stem = alone[0]
        at, other = (ours[stem], labels) if stem in ours else (theirs[stem], images)
        raise FwError(
            f"{at}: expected a file {stem}.* in {other}; there is none; {len(alone)} such files in "
            f"{folder}"
        )
    return [Pair(ours[stem], theirs[stem]) for stem in ours]


def _by_stem(folder: Path) -> dict[str, Path]:
    """The files of a folder by their names up to the last dot."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.stem in found:
            raise FwError(f"{path}: expected one file {path.stem}.*; {found[path.stem]} is another")
        found[path.stem] = path
    return found
