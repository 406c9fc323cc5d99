"""What a training step is planned for while there is no data: a model, and the shapes of a batch.

`Work` says what is trained, `source_of` reads its config or makes that of a new model, and
`Source.batch` has what `fw.data` would make of a data set's rows. `fw.planning` makes steps of it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from fw import assets
from fw.adaptation import LoraOptions
from fw.errors import FwError
from fw.hub.config import Head, choose_head, read_config
from fw.hub.families import FAMILIES, Family, family_of
from fw.hub.files import CONFIG, read_json
from fw.hub.folder import computed
from fw.labels import LABELLED
from fw.model import Model
from fw.models.pixels import normalised
from fw.options import parted, read_fields
from fw.processors.image import image_defaults
from fw.processors.segment import SIDE, UNET
from fw.recipe import NEW, TASKS
from fw.table_optimizer import TableOptions

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}


def _llama(vocab: int, width: int, layers: int, heads: int, keys: int, mlp: int, **more: Any):
    sizes = {
        "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys, "intermediate_size": mlp,
    }  # fmt: skip
    return _LLAMA | sizes | more


KNOWN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-2-7b": _llama(32_000, 4096, 32, 32, 32, 11_008),
        "llama-2-13b": _llama(32_000, 5120, 40, 40, 40, 13_824),
        "llama-2-70b": _llama(32_000, 8192, 80, 64, 8, 28_672),
        "llama-3.1-8b": _llama(128_256, 4096, 32, 32, 8, 14_336, rope_theta=500_000.0),
        "llama-3.1-70b": _llama(128_256, 8192, 80, 64, 8, 28_672, rope_theta=500_000.0),
        "llama-3.1-405b": _llama(128_256, 16_384, 126, 128, 8, 53_248, rope_theta=500_000.0),
        "mistral-7b": _llama(32_000, 4096, 32, 32, 8, 14_336) | {"model_type": "mistral"},
        "mixtral-8x7b": _llama(
            32_000, 4096, 32, 32, 8, 14_336, num_local_experts=8, num_experts_per_tok=2
        ) | {"model_type": "mixtral"},
        "qwen3-8b": _llama(151_936, 4096, 36, 32, 8, 12_288, head_dim=128)
        | {"model_type": "qwen3"},
    }
)  # fmt: skip
"""Sizes of models that many train, by name, as their `config.json` has them."""

WHOLE = LoraOptions()
"""No adapters: the whole model is trained."""

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Work:
    """What is to be trained.

    Attributes:
      model: a name of `KNOWN` or of `fw fetch --list`, a model folder, or a `config.json`; or one
        of `fw.recipe.NEW`, a new model: "mlp" or "ft_transformer" for tables, "dlrm" or "two_tower"
        for recommenders, "unet", "resnet" or "vit" for images.
      batch: rows of a step, of all devices together.
      length: tokens of a row of texts.
      task: as a model's head has it, or as `fw finetune --task` does; None takes the config's.
      classes: labels of a head that has some.
      size: side in pixels of images; 0 for that of the model.
      channels: of images that a new model takes.
      history: items of a user that a recommender is given.
      precision: of the step.
      rules: preset of the layout.
      config: keys of the config that are to be others; as `fw finetune --config` spells them, or as
        a mapping.
      remat: what may be computed again, of those that the model has; None for all that it has.
      moments: of the optimiser, that may be taken.
      table_optimizer: of embedding tables that are cut by rows, as in `fw finetune`.
      accumulate: microbatches that may be taken; None for those that the batch divides into.
      causal_half: whether a model's own FLOPs leave out the half of attention that nobody sees.
      adapters: that may be trained in place of the whole model, which `WHOLE` stands for.
    """

    model: str
    batch: int
    length: int = 128
    task: str | None = None
    classes: int = 2
    size: int = 0
    channels: int = 3
    history: int = 50
    precision: str = "bf16_activations"
    rules: str = "fsdp_tensor"
    config: Mapping[str, Any] | str = ""
    remat: tuple[str | None, ...] | None = None
    moments: tuple[str, ...] = ("float32",)
    table_optimizer: str = TableOptions.table_optimizer
    accumulate: tuple[int, ...] | None = None
    causal_half: bool = True
    adapters: tuple[LoraOptions, ...] = (WHOLE,)

    def __post_init__(self):
        """Checks what can be checked before anything is read.

        Raises:
          FwError: the option, its value, and what was expected.
        """
        TableOptions(self.table_optimizer)
        least = dict.fromkeys(("batch", "length", "classes", "channels", "history"), 1)
        for name, few in (least | {"size": 0}).items():
            if getattr(self, name) < few:
                raise FwError(f"{name} is {getattr(self, name)}; expected {few} or more")
        if min(self.accumulate or (1,)) < 1:
            raise FwError(f"accumulate is {self.accumulate}; expected numbers from 1")

    @property
    def long_task(self) -> str | None:
        """The task as a model's head has it."""
        return TASKS.get(self.task or "", self.task)


@dataclass(frozen=True)
class Source:
    """A model's config, read: which family, and how to make it with other settings.

    Attributes:
      family: of models.
      config: as in a `config.json`.
      head: what for.
      row: of the batch, shapes and dtypes by name, where data says them; None where none is there.
    """

    family: Family
    config: Mapping[str, Any]
    head: Head
    row: Shapes | None = None

    def model(self, **how: Any) -> Model:
        """The model, computed in a way: `microbatches`, `remat`, `scan`."""
        own = computed(self.family, **({"microbatches": 1, "remat": None, "scan": True} | how))
        config = read_config(self.family, self.config, CONFIG, self.head, 2**31 - 1, own)
        model = self.family.model(config)
        if self.head.task in IMAGES:  # as bytes, that the model makes numbers of
            level = [0.5] * config.num_channels
            model = normalised(model, level, level)
        return model

    def dense(self) -> "Source":
        """With as many products, but none in vain: in place of experts one, as large as are chosen.

        How rows are brought to their experts may need more, to fill blocks.
        """
        chosen = self.config.get("num_experts_per_tok")
        if not chosen:
            return self
        size = chosen * self.config["intermediate_size"]
        one = {"num_local_experts": 1, "num_experts_per_tok": 1, "intermediate_size": size}
        return replace(self, config={**self.config, **one})

    @property
    def fields(self) -> set[str]:
        """Names of the config's fields."""
        return {field.name for field in dataclasses.fields(self.family.config)}  # type: ignore[arg-type]

    def batch(self, work: Work) -> Shapes:
        """The arrays of a step, by name.

        Raises:
          FwError: images of another size than the model's.
        """
        row = self.row
        if row is None:
            row = next(make for tasks, make in _ROWS.items() if self.head.task in tasks)(work, self)
        return {
            name: jax.ShapeDtypeStruct((work.batch, *x.shape), x.dtype) for name, x in row.items()
        }


def source_of(work: Work) -> Source:
    """The config of a work's model.

    Raises:
      FwError: a name that is not known, a config that is not of a family, or a task that it cannot
        have.

    >>> made = source_of(Work("dlrm", 8, config="columns=user/item,rows=40/50,numbers=age,size=4"))
    >>> {name: (x.shape, str(x.dtype)) for name, x in made.batch(Work("dlrm", 8)).items()}
    {'user': ((8,), 'int32'), 'item': ((8,), 'int32'), 'age': ((8,), 'float32'),
     'labels': ((8,), 'int32')}
    """
    found = _new(work) if work.model in NEW else _stored(work)
    if "model_type" not in found and (Path(work.model) / "model" / CONFIG).is_file():
        raise FwError(f"{work.model} is a run; give {work.model}/model, what it trained")
    family = family_of(found, work.model)
    tasks = [name for name in family.architectures if name in TASKS.values()]
    task = work.long_task or ("causal_lm" if "causal_lm" in tasks else tasks[0])
    if task not in tasks:
        raise FwError(f"task {work.task!r}: {work.model} is for {spelt(tasks)}")
    _check_options(work, task)
    labels = ()
    if task in LABELLED:
        count = 1 if task == "tabular_regression" else work.classes
        labels = tuple(f"LABEL_{n}" for n in range(count))
    if task == "token_classification":
        labels = ("O", *(f"B-{n}" for n in range(1, max(work.classes, 2))))
    found = {**found, "architectures": [family.architectures[task]]}
    head = choose_head(family, found, work.model, task=task, labels=labels, limit=2**31 - 1)
    return Source(family, found, head)


def spelt(tasks: Iterable[str]) -> str:
    """Tasks as `fw finetune --task` has them."""
    return ", ".join(name for name, long in TASKS.items() if long in {*tasks})


def _check_options(work: Work, task: str) -> None:
    """Refuses what the task or the model would not heed."""
    default = {field.name: field.default for field in dataclasses.fields(work)}
    heeded = {
        "size": IMAGES, "channels": IMAGES if work.model in NEW else (),
        "history": ("ranking", "retrieval"), "table_optimizer": ("ranking", "retrieval"),
        "classes": LABELLED,
    }  # fmt: skip
    for name, tasks in heeded.items():
        if task not in tasks and getattr(work, name) != default[name]:
            what = f"is for {spelt(tasks)}" if tasks else "is what the model has"
            raise FwError(f"{name} {what}; {work.model} is for {spelt([task])}")


def _stored(work: Work) -> Mapping[str, Any]:
    """The config of a model that has one, with what is to be others."""
    if work.model in KNOWN:
        found: Mapping[str, Any] = KNOWN[work.model]
    else:
        path = Path(work.model)
        if path.suffix == ".json" and path.is_file():
            found = read_json(path)
        elif (path / CONFIG).is_file():
            found = read_json(path / CONFIG)
        elif path.exists():
            raise FwError(f"{path}: there is no {CONFIG} to plan for")
        else:
            try:
                folder = Path(assets.fetch(work.model))
            except FwError as error:
                names = ", ".join((*KNOWN, *NEW))
                raise FwError(f"{error}; or one of {names}, or a config.json") from None
            if not (folder / CONFIG).is_file():
                raise FwError(f"{work.model} has no {CONFIG}; give one by its path")
            found = read_json(folder / CONFIG)
    return {**found, **(_pairs(work.config) if isinstance(work.config, str) else work.config)}


def _pairs(text: str) -> dict[str, Any]:
    """Keys of a `config.json`, whose types it alone knows, as in "num_hidden_layers=16"."""
    found: dict[str, Any] = {}
    for item in parted(text):
        key, equals, value = item.partition("=")
        if not equals:
            raise FwError(f"config: {item!r}; expected key=value")
        try:
            found[key] = int(value)
        except ValueError:
            try:
                found[key] = float(value)
            except ValueError:
                found[key] = {"true": True, "false": False}.get(value, value)
    return found


_TABLE = ({"numbers": 0, "categories": ()}, "numbers=20,categories=12/40")
_DECIDED: Mapping[str, tuple[Mapping[str, Any], str]] = MappingProxyType(
    {
        "mlp": _TABLE,
        "ft_transformer": _TABLE,
        "dlrm": (
            {"columns": (), "rows": ()},
            "columns=user/item/shop,rows=1000000/40000/500,numbers=price,history=true",
        ),
        "two_tower": (
            {"user_columns": ("user",), "item_columns": ("item",)}
            | {"user_rows": (), "item_rows": ()},
            "user_rows=1000000,item_rows=40000",
        ),
    }
)
"""What data decides of new models, as it is without any, and an example."""


def _new(work: Work) -> Mapping[str, Any]:
    """The config of a new model, as `fw finetune` would make it."""
    kind: Any = FAMILIES[work.model].config
    tasks = [TASKS[name] for name in NEW[work.model]]
    task = work.long_task or tasks[0]
    if task not in tasks:
        raise FwError(f"task {work.task!r}: {work.model} is for {spelt(tasks)}")
    given: dict[str, Any] = {"task": task}
    defaults, example = _DECIDED.get(work.model, ({}, ""))
    if task in LABELLED:
        given["num_labels"] = 1 if task == "tabular_regression" else work.classes
    if task in IMAGES:
        given["num_channels"] = work.channels
        side = work.size or (SIDE if task == "segmentation" else _IMAGENET)
        defaults = UNET if task == "segmentation" else image_defaults(work.model, side, side)
        if work.model == "vit":
            given["image_size"] = (side, side)
    try:
        if isinstance(work.config, str):
            config = read_fields(kind, work.config, defaults=defaults, **given)
        else:
            config = kind(**{**defaults, **given, **work.config})
    except FwError as error:
        raise FwError(f"{error}; as in config {example}" if example else str(error)) from None
    except TypeError as error:  # of a mapping
        raise FwError(f"config of {work.model}: {error}") from None
    written = FAMILIES[work.model].writes(config)
    return {"model_type": work.model, **json.loads(json.dumps(written))}


IMAGES = ("image_classification", "segmentation")
_WORDS = ("causal_lm", "masked_lm")
_IMAGENET = 224  # side of images, where nobody says it

_f32, _i32 = jnp.float32, jnp.int32


def _shapes(**arrays: tuple[tuple[int, ...], Any]) -> Shapes:
    return {name: jax.ShapeDtypeStruct(*one) for name, one in arrays.items()}


def _image(work: Work, source: Source) -> Shapes:
    config, one = source.model().config, source.head.task == "image_classification"
    own = getattr(config, "image_size", None)
    side = work.size or (_IMAGENET if one else SIDE)
    sides: tuple[int, ...] = (side, side) if own is None else (own, own)
    if isinstance(own, list | tuple):
        sides = tuple(own)
    if work.size and sides != (work.size, work.size):
        raise FwError(
            f"size is {work.size}, but {work.model} takes {sides[0]} × {sides[1]} pixels; leave it "
            "out"
        )
    multiple = getattr(config, "multiple", 1)
    if sides[0] % multiple:
        raise FwError(f"size is {sides[0]}; expected a multiple of {multiple} for this model")
    labels: tuple[int, ...] = () if one else sides
    return _shapes(images=((*sides, config.num_channels), jnp.uint8), labels=(labels, _i32))


def _text(work: Work, source: Source) -> Shapes:
    tokens, task = ((work.length,), _i32), source.head.task
    found: dict[str, Any] = dict.fromkeys(("input_ids", "segment_ids", "position_ids"), tokens)
    if task in _WORDS:
        return _shapes(**found, targets=tokens)
    if task == "token_classification":
        return _shapes(**found, labels=tokens)
    texts = max(work.length // 8, 1)  # of a row, as `fw.data.pack` has room for
    if task == "question_answering":
        if getattr(source.model().config, "type_vocab_size", 1) > 1:  # question, or text
            found["token_type_ids"] = tokens
        return _shapes(**found, labels=((texts, 2), _i32))
    labels = (texts,) if task == "sequence_classification" else (texts, len(source.head.labels))
    kind = _f32 if task == "regression" else _i32
    return _shapes(**found, first=((texts,), _i32), labels=(labels, kind))


def _row(work: Work, source: Source) -> Shapes:
    config = source.model().config
    found: dict[str, Any] = {}
    if config.numbers:
        found |= dict.fromkeys(("numbers", "missing"), ((config.numbers,), _f32))
    if config.categories:
        found["categories"] = ((len(config.categories),), _i32)
    number = source.head.task == "tabular_regression"
    return _shapes(**found, labels=((1,), _f32) if number else ((), _i32))


def _event(work: Work, source: Source) -> Shapes:
    config, ranked = source.model().config, source.head.task == "ranking"
    own = ("",) if ranked else ("user_", "item_")
    found: dict[str, Any] = {n: ((), _i32) for of in own for n in getattr(config, f"{of}columns")}
    found |= {n: ((), _f32) for of in own for n in getattr(config, f"{of}numbers")}
    if config.history:
        found["history"] = ((work.history,), _i32)
    asked = {"labels": ((), _i32)} if ranked else {"target": ((), _i32), "log_q": ((), _f32)}
    return _shapes(**found, **asked)


OF_TEXTS = (
    *_WORDS, "token_classification", "question_answering", "sequence_classification",
    "multi_label_classification", "regression",
)  # fmt: skip
_ROWS: Mapping[tuple[str, ...], Callable[[Work, Source], Shapes]] = {
    IMAGES: _image,
    OF_TEXTS: _text,
    ("tabular_classification", "tabular_regression"): _row,
    ("ranking", "retrieval"): _event,
}
"""What makes a row of a batch, by tasks."""
