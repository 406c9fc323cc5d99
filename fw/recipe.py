"""The recipe of a fine-tuning run as data: every option, its meaning, and what is refused at once.

`fw.finetune` cooks by it, `fw.options` makes the command line of it, a run's `config.json` holds
it, and `read_recipe` gets it back from there.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jax.sharding import Mesh

from fw import adaptation, assets, precision, run
from fw.adaptation import LoraOptions
from fw.data.readers import SCHEMES
from fw.data.targets import SEPARATOR
from fw.distillation import Distil
from fw.errors import FwError
from fw.lessons import SOFT, difference
from fw.models.stack_layout import default_microbatches
from fw.optimizer import AdamW
from fw.options import check_choices
from fw.processors import processor_of
from fw.qat import QatOptions
from fw.sparsity import Sparse
from fw.table_optimizer import TableOptions
from sharding.parallel.averages import exchange
from sharding.parallel.pipeline import REMAT

TASKS = {
    "ner": "token_classification",
    "classify": "sequence_classification",
    "multilabel": "multi_label_classification",
    "regress": "regression",
    "qa": "question_answering",
    "mlm": "masked_lm",
    "lm": "causal_lm",
    "tabular": "tabular_classification",
    "estimate": "tabular_regression",
    "rank": "ranking",
    "retrieve": "retrieval",
    "image": "image_classification",
    "segment": "segmentation",
}
"""What `--task` says, and the task that model, data and artifact know."""

_TABLES = ("tabular", "estimate")
NEW: Mapping[str, tuple[str, ...]] = {
    "mlp": _TABLES,
    "ft_transformer": _TABLES,
    "two_tower": ("retrieve",),
    "dlrm": ("rank",),
    "resnet": ("image",),
    "vit": ("image",),
    "unet": ("segment",),
}
"""Models that `--model` names and that begin with random parameters, and their tasks."""

_TEXTS = ("ner", "classify", "multilabel", "regress", "qa", "mlm", "lm")
_IMAGES, _EVENTS = ("image", "segment"), ("rank", "retrieve")
TAUGHT = (*SOFT, "mlm", "lm")
"""Tasks that a teacher is for."""

_ONLY: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("length", "packed", "texts", "scheme", "separator"): _TEXTS,
    ("columns",): (*_TEXTS, "image"),
    ("target", "drop", "numeric", "categorical"): _TABLES,
    ("classes",): (*_TABLES, "segment"),
    ("size", "augment"): _IMAGES,
    ("ignore",): ("segment",),
    ("smoothing",): ("image",),
    ("threshold", "history", "split", "table_optimizer", "table_learning_rate"): _EVENTS,
    ("unlabelled",): ("ner", "classify"),
    ("temperature",): tuple(task for task in TAUGHT if SOFT.get(task) is not difference),
}
"""Options that only some tasks heed."""

_UNCHANGED = ("ner", "classify", "multilabel", "regress", "qa", "tabular", "estimate")
"""Tasks whose rows are the same in every epoch, so that a teacher may be asked once."""

LEARNING_RATE = 1e-3
"""Of a new model, where nothing is said."""

SPLITS = ("auto", "last", "hash")

_POSITIVE = ("batch", "length", "accumulate", "log_every", "keep_last", "keep_best")
_NOT_NEGATIVE = ("epochs", "steps", "texts", "evaluate_every", "microbatches", "history", "size")
_REMAT = {name or "none": name for name in REMAT}


@dataclasses.dataclass(frozen=True)
class Finetune(AdamW, TableOptions, LoraOptions, Distil, Sparse, QatOptions):
    """The recipe of a fine-tuning run; every field is an option of `fw finetune`.

    Attributes:
      task: "ner" (a tag for each word), "classify" (a class for each text), "multilabel" (any
        number of labels for each text), "regress" (numbers for each text), "qa" (the passage of a
        text that answers a question), "mlm" (words that are hidden), "lm" (the next word of
        documents, and of answers in conversations), "tabular" (a class for each row of a table) or
        "estimate" (a number for each row), "retrieve" (the items that a user takes), "rank"
        (whether a user takes an item), "image" (a class for each image) or "segment" (a class for
        each of its pixels).
      model: a name of `fw fetch --list`, or a Hugging Face model folder; or a new model: "mlp" or
        "ft_transformer" for tables, "resnet" or "vit" for images, "unet" to segment, "two_tower" to
        retrieve, "dlrm" to rank. Nothing: all-MiniLM-L6-v2 for texts, ft_transformer, resnet, and
        the others.
      config: fields of a new model's config, as in depth=4,sizes=32/64.
      data: a file, or a folder with train, dev and test files (CoNLL, CSV, TSV, JSON lines), or a
        name of `fw fetch --list`.
      run: the run's folder, made by it.
      learning_rate: at its peak, after the warm-up; 0 for 5e-5, with lora and for new models 1e-3.
      epochs: passes over the training data.
      steps: optimiser steps; 0 for as many as the epochs take.
      batch: rows a step; a packed row holds several texts.
      length: tokens a row.
      packed: several texts share a row, none sees another; off: one text a row.
      texts: texts a row may hold; 0 for length / 8.
      mesh: devices by axis, as in data=2,fsdp=2,tensor=2; one size may be -1.
      plan: a plan.json of `fw plan`, whose best layout takes the place of mesh, remat, accumulate,
        moments and lora; or auto, to plan for the data and the machine at hand.
      rules: preset that says which array axis goes to which mesh axis: data, fsdp, fsdp_tensor.
      exchange: how gradients are averaged over data: float32; int8, a quarter of the bytes; or
        powersgd:RANK, as powersgd:4, thin factors of them. What is left out comes later.
      precision: of the dots: bf16 (bfloat16 operands, float32 sums) or f32; bf16_activations: what
        flows between operations in bfloat16 as well.
      accumulate: microbatches whose gradients make one step; must divide batch.
      microbatches: parts of their rows that the stages of a mesh with pipe work on in turn; 0 for
        two a stage.
      remat: what the backward pass computes again, for less memory: none; dots: all but products
        with weights; layer: each layer; stage: each stage of a mesh with pipe.
      seed: of the new head, the order of the data, dropout and hidden words.
      evaluate_every: steps between evaluations and checkpoints; 0 for once an epoch.
      log_every: steps between lines of progress.
      keep_last: how many of the latest checkpoints stay.
      keep_best: how many of the best checkpoints stay.
      columns: names of input and target column, as in text,label; for tables and JSON lines.
        "regress" takes one target or more.
      target: for "tabular" and "estimate", the column to predict; "target" if nothing is said.
      drop: columns of a table to leave out, parted by commas.
      numeric: columns of numbers, whatever they look like.
      categorical: columns of categories, whatever they look like.
      classes: of a table's target in the order of their ids, of two the positive one last.
      ignore: the value of a map's pixels that have no class, such as 255; -1 for none.
      smoothing: of the labels of images: the share that all classes have alike.
      threshold: the least rating that counts as liked, for "rank" and "retrieve"; 0 for none.
      history: how many of a user's last items are known of them.
      split: of events: last (each user's last for the test, the one before for dev), hash (of
        pairs), or auto: last where there are timestamps.
      size: side in pixels of the squares that images are resized to, or cut into for "segment"; 0
        for that of the images, for "segment" 256.
      augment: what is done to images in training, as in crop=4,flip,randaugment=2/9,mixup=0.2; see
        `fw.data.augment`.
      scheme: of the tags in the files: auto, bio or iob1.
      separator: between the labels in a table's cell, for "multilabel".
      skip_bad_rows: count rows that cannot be read instead of stopping at the first.

    >>> Finetune(data="reviews.csv", batch=6, accumulate=4)
    Traceback (most recent call last):
    ...
    fw.errors.FwError: batch is 6, which accumulate=4 does not divide; choose a multiple of 4
    """

    task: str = "ner"
    model: str = ""
    config: str = ""
    data: str = ""
    run: str = "runs/latest"
    learning_rate: float = 0.0
    epochs: float = 3.0
    steps: int = 0
    batch: int = 8
    length: int = 128
    packed: bool = True
    texts: int = 0
    mesh: str = "data=1"
    plan: str = ""
    rules: str = "fsdp_tensor"
    exchange: str = "float32"
    precision: str = "bf16"
    accumulate: int = 1
    microbatches: int = 0
    remat: str = "none"
    seed: int = 0
    evaluate_every: int = 0
    log_every: int = 10
    keep_last: int = 1
    keep_best: int = 1
    columns: str = ""
    target: str = ""
    drop: str = ""
    numeric: str = ""
    categorical: str = ""
    classes: str = ""
    size: int = 0
    augment: str = ""
    ignore: int = -1
    smoothing: float = 0.0
    threshold: float = 0.0
    history: int = 50
    split: str = "auto"
    scheme: str = "auto"
    separator: str = SEPARATOR
    skip_bad_rows: bool = False

    def __post_init__(self):
        """Checks what can be checked before anything is read.

        Raises:
          FwError: the name of the option, its value, and what was expected.
        """
        for field in dataclasses.fields(self):
            if field.type is float and not math.isfinite(value := getattr(self, field.name)):
                raise FwError(f"{field.name} is {value}; expected a number")
        AdamW.__post_init__(self)
        TableOptions.__post_init__(self)
        LoraOptions.__post_init__(self)
        Distil.__post_init__(self)
        Sparse.__post_init__(self)
        QatOptions.__post_init__(self)
        choices = {"task": TASKS, "scheme": SCHEMES, "remat": _REMAT, "split": SPLITS}
        check_choices(self, choices)
        self._check_paths()
        precision.policy(self.precision)
        if self.exchange != "float32":
            exchange(self.exchange)
        self._settle()
        for least, names in ((1, _POSITIVE), (0, _NOT_NEGATIVE)):
            for name in names:
                if getattr(self, name) < least:
                    raise FwError(f"{name} is {getattr(self, name)}; expected {least} or more")
        if not (self.epochs or self.steps):
            raise FwError("epochs and steps are both 0; give one of them")
        if not 0 <= self.seed < 2**32:
            raise FwError(f"seed is {self.seed}; expected 0 … {2**32 - 1}")
        if self.batch % self.accumulate:
            raise FwError(
                f"batch is {self.batch}, which accumulate={self.accumulate} does not divide; "
                f"choose a multiple of {self.accumulate}"
            )
        if not 0 <= self.smoothing < 1:
            raise FwError(f"smoothing is {self.smoothing}; expected 0 or more, less than 1")
        self._check_columns()

    def computed(self, mesh: Mesh) -> dict[str, Any]:
        """How the layers are computed on a mesh, as `fw.hub.load` takes it.

        Raises:
          FwError: microbatches that do not divide the rows of a step.
        """
        parts, rows = self.microbatches or default_microbatches(mesh), self.batch // self.accumulate
        if rows % parts:
            name = "batch" if self.accumulate == 1 else "batch / accumulate"
            raise FwError(
                f"{name} is {rows}, which microbatches={parts} does not divide; choose a multiple "
                f"of {parts}, or --microbatches"
            )
        return {"microbatches": parts, "remat": _REMAT[self.remat]}

    @property
    def long_task(self) -> str:
        """The task as model, data and artifact know it."""
        return TASKS[self.task]

    @property
    def names(self) -> tuple[str, ...] | None:
        """The columns' names; None if they are left to the reader."""
        return tuple(self.columns.split(",")) if self.columns else None

    def _settle(self) -> None:
        """What the task or the model decides, so that a run's config tells it."""
        if not self.model:
            object.__setattr__(self, "model", processor_of(self.long_task).default)
        if self.task not in (tasks := NEW.get(self.model, (self.task,))):
            raise FwError(f"model {self.model!r} is for {', '.join(tasks)}, not {self.task}")
        self._check_options()
        if self.lora and self.task in _IMAGES:
            adaptation.check_images(self.precision)
        if not self.learning_rate:
            rate = adaptation.LEARNING_RATE if self.lora else AdamW.learning_rate
            rate = LEARNING_RATE if self.model in NEW else rate
            object.__setattr__(self, "learning_rate", rate)

    def _check_options(self) -> None:
        """Refuses what the task or the model would not heed."""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for names, tasks in _ONLY.items():
            for name in names:
                if self.task not in tasks and getattr(self, name) != default[name]:
                    raise FwError(f"{name} is for {', '.join(tasks)}, not {self.task}")
        if self.qat and precision.policy(self.precision).activations:
            raise FwError(f"precision {self.precision}: qat learns in float32; choose bf16 or f32")
        if self.config and self.model not in NEW:
            raise FwError(f"config is for new models, {', '.join(NEW)}; {self.model} has its own")
        if self.teacher and self.task not in TAUGHT:
            raise FwError(f"a teacher is for {', '.join(TAUGHT)}, not {self.task}")
        if self.offline and self.task not in _UNCHANGED:
            raise FwError(f"teacher_offline is for {', '.join(_UNCHANGED)}, not {self.task}")
        heard = self.teacher_weight or self.teacher_hidden or self.teacher_attention
        if self.unlabelled and not heard:
            raise FwError("unlabelled is for a teacher that is heard; give it teacher_weight")
        if self.teacher and self.lora:
            raise FwError("a teacher is for models that are trained whole; leave lora or it away")
        if self.sparse and self.lora:
            raise FwError("sparsity is for models that are trained whole; leave lora or it away")
        if self.qat and (self.lora or self.sparse):
            raise FwError(
                "qat is for models that are trained whole; leave lora, sparsity or it away"
            )
        if self.lora and self.model in NEW:
            raise FwError(f"lora is for pretrained models; {self.model} is new: train it whole")

    def _check_paths(self) -> None:
        if not self.data:
            raise FwError("data is missing; give --data a file or a folder")
        if "[" in str(Path(self.run).absolute()):  # orbax would glob for its arrays, and find none
            raise FwError(f"run is {self.run!r}, whose path has a '[': checkpoints would be lost")

    def _check_columns(self) -> None:
        if not self.separator:
            raise FwError("separator is empty; expected what stands between two labels")
        names = self.names or ("text", "label")
        many = self.task == "regress"
        if not (len(names) == 2 or (many and len(names) > 2)) or len({*names} - {""}) < len(names):
            expected = "two or more names" if many else "two names"
            raise FwError(f"columns is {self.columns!r}; expected {expected}, as in text,label")


def read_recipe(folder: str | Path) -> Finetune:
    """The recipe in a run's `config.json`.

    Args:
      folder: a run; an option that is not in its file, because it is newer, has its default.

    Raises:
      FwError: no run there, or a value that is no such option's.
    """
    options, where = run.config(folder), Path(folder) / run.CONFIG
    given = {}
    for field in dataclasses.fields(Finetune):
        if field.name not in options:
            continue
        value, kind = options[field.name], cast(type, field.type)
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
            raise FwError(
                f"{where}: 'config/{field.name}': expected {kind.__name__}, got {value!r}; "
                "restore the file"
            )
        given[field.name] = value
    try:
        return Finetune(**given)
    except FwError as error:
        raise FwError(f"{where}: {error}; restore the file") from error


def locate(data: str, what: str = "data") -> Path:
    """The user's own file, or the folder of `fw.assets.fetch`.

    Args:
      data: a file, a folder or a name.
      what: the option it was given as, for the error.

    Raises:
      FwError: neither.

    >>> locate("nowhere/train.csv")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: data: there is no folder nowhere/train.csv; ...
    """
    if Path(data).is_file():
        return Path(data)
    try:
        return assets.fetch(data)
    except FwError as error:
        raise FwError(f"{what} {data!r} is no file: {error}") from error
