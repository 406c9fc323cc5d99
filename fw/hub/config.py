"""What a `config.json` says of a model and its labels, read with suspicion, and written back.

The file may come from anywhere, so nothing in it is believed that the tensors beside it do not bear
out. `families` knows which keys a family has, `folder` brings the parameters.
"""

import dataclasses
import json
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown  # a hostile file may hold a long value
from typing import Any, get_args, get_origin

from fw.errors import FwError
from fw.hub.families import FAMILIES, Family
from fw.hub.files import CONFIG, read_json, read_small
from fw.hub.header import parse_json
from fw.labels import LABELLED, PROBLEMS

SUPERSEDED = (
    "auto_map",  # code beside the source, which is not carried along
    "num_labels",  # id2label says it, and they may differ
    "problem_type",  # the task says it
    "torch_dtype",  # older spelling of dtype
)
"""Keys of the source that are not written back."""

MODULES, POOLING = "modules.json", "1_Pooling"
"""The file and the folder in which sentence-transformers says how a text gets its vector."""

_PACKAGE = "sentence_transformers.models"
_MODULES = {"Transformer": "", "Pooling": POOLING, "Normalize": "2_Normalize"}
_POOLINGS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


@dataclass(frozen=True)
class Head:
    """What a folder is loaded for.

    Attributes:
      task: as in the config of the model.
      labels: by id.
      kept: whether the folder's classifier is one for this task and these labels.
    """

    task: str
    labels: tuple[str, ...]
    kept: bool


def choose_head(
    family: Family,
    source: Mapping[str, Any],
    where: object,
    *,
    task: str | None,
    labels: Sequence[str] | None,
    limit: int,
) -> Head:
    """Brings together what the caller wants and what the folder has.

    The folder's classifier is kept if it is one for the task, and its labels are those asked for
    or unnamed (LABEL_0, LABEL_1 …) and as many.

    Args:
      family: of the folder.
      source: its `config.json`.
      where: the path of that, for messages.
      task: None takes the folder's.
      labels: None takes the folder's.
      limit: how many labels a folder can have, by its tensors.

    Raises:
      FwError: the folder cannot say what is left open, or labels that are no set of names.
    """
    classes = source.get("architectures") or []
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise FwError(
            f"{where}: 'architectures' is {shown(classes)}; expected a list of class names"
        )
    named = {name: task for task, name in family.architectures.items()} | dict(family.variants)
    stated = next((task for name, task in named.items() if [name] == classes[:1]), None)
    of_texts, problem = stated in PROBLEMS, source.get("problem_type")
    if of_texts and task is None:
        stated = _task_of(problem, _own_labels(source, where, limit), where)
    task = task or stated
    if task is None:
        raise FwError(
            f"{where}: 'architectures' is {shown(classes)}, which names no task; give one of "
            f"{', '.join(family.architectures)} as task"
        )
    if task not in family.architectures:
        raise FwError(f"task {task!r} is unknown; choose one of {', '.join(family.architectures)}")
    if task not in LABELLED:
        if labels:
            raise FwError(f"labels: {task} has no classes to name")
        return Head(task, (), task == stated)
    same = not classes or task == stated or (of_texts and task in PROBLEMS)
    own = _own_labels(source, where, limit) if same else None
    if task in PROBLEMS and own is not None and not _solves(problem, task, len(own)):
        own = None
    if labels is not None:
        labels = check_labels(labels, "labels")
        return Head(task, labels, own in (labels, _unnamed(len(labels))))
    if own is None:
        raise FwError(f"{where}: {shown(classes)} has no labels for {task}; give labels")
    return Head(task, own, True)


def read_config(
    family: Family,
    source: Mapping[str, Any],
    where: object,
    head: Head,
    limit: int,
    extra: Mapping[str, Any] = types.MappingProxyType({}),
) -> Any:
    """The config of the model from `config.json`.

    Args:
      family: of the folder.
      source: its `config.json`.
      where: the path of that, for messages.
      head: gives `task` and `num_labels`.
      limit: the largest integer that the tensors bear out; nothing larger is believed.
      extra: fields that other files say.

    Raises:
      FwError: a key is missing, of another type or range, or asks for what is not implemented.
    """
    for key, only in family.fixed.items():
        if source.get(key, only) not in (only, None):
            raise FwError(
                f"{where}: {key} {shown(source[key])} is not supported; expected {only!r}"
            )
    given: dict[str, Any] = {"task": head.task, **extra}
    fields = dataclasses.fields(family.config)  # type: ignore[arg-type]
    if any(field.name == "num_labels" for field in fields):
        given["num_labels"] = len(head.labels)
    try:
        source = family.reads(source)
    except FwError as error:
        raise FwError(f"{where}: {error}") from None
    for field in fields:
        if field.name in given or field.name in family.own:
            continue
        if field.name in source:
            given[field.name] = _checked(field, source[field.name], where, limit)
        elif field.default is dataclasses.MISSING:
            raise FwError(f"{where}: {field.name!r} is missing; is this a model folder?")
    return family.config(**given)


def write_config(
    config: Any, labels: tuple[str, ...], dtype: str, source: Mapping[str, Any]
) -> dict[str, Any]:
    """The `config.json` of a model.

    Args:
      config: of the model.
      labels: by id.
      dtype: of the parameters.
      source: the `config.json` that the model came from; keys that fw does not know are kept.

    Raises:
      FwError: a model of no known family, or another number of labels than it has.
    """
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None or family.config is not type(config):
        raise FwError(f"a {type(config).__name__} is of no family with a folder format")
    named: dict[str, Any] = {}
    if config.task in LABELLED:
        if len(check_labels(labels, "labels")) != config.num_labels:
            raise FwError(f"the model has {config.num_labels} labels, got {len(labels)}")
        named = {
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    if config.task in ("multi_label_classification", "regression"):
        named["problem_type"] = PROBLEMS[config.task]
    fields = {k: v for k, v in family.writes(config).items() if k not in family.own}
    for name in ("head_size", "inner_size", "inner_sizes", "channels"):  # no keys of transformers'
        if fields.get(name, 0) is None:
            del fields[name]
    return {
        **{key: value for key, value in source.items() if key not in SUPERSEDED},
        "architectures": [family.architectures[config.task]],
        **fields,
        **named,
        "dtype": dtype,
        "model_type": config.model_type,
    }


def read_pooling(folder: Path) -> dict[str, Any]:
    """`pooling` and `normalize` of an embedding, where a folder of sentence-transformers says them.

    Raises:
      FwError: it pools in another way than "mean" or "cls".
    """
    modules, path = folder / MODULES, folder / POOLING / CONFIG
    if not path.is_file():
        return {}
    found = read_json(path)
    modes = [key for key, on in found.items() if key.startswith("pooling_mode_") and on is True]
    names = {mode: name for name, mode in _POOLINGS.items()}
    if len(modes) != 1 or modes[0] not in names:
        raise FwError(f"{path}: pools by {shown(modes)}; expected one of {', '.join(names)}")
    kinds = _kinds(modules) if modules.is_file() else ()
    return {"pooling": names[modes[0]], "normalize": "Normalize" in kinds}


def _kinds(path: Path) -> tuple[str, ...]:
    """The modules that make a vector, one after another; `FwError` for any that fw does not."""
    expected = "a list of objects with 'type'"
    rows = parse_json(read_small(path), path, expected)
    try:
        kinds = tuple(row["type"].rpartition(".")[2] for row in rows)
    except (TypeError, KeyError, AttributeError) as error:
        raise FwError(f"{path}: expected {expected}: {error!r}") from error
    odd = [kind for kind in kinds if kind not in _MODULES or kinds.count(kind) > 1]
    if odd:
        raise FwError(
            f"{path}: module {shown(odd[0])}; expected {', '.join(_MODULES)}, each at most once"
        )
    return kinds


def write_pooling(folder: Path, config: Any) -> None:
    """Writes what `read_pooling` reads, and sentence-transformers loads, of an embedding's config.

    >>> import tempfile
    >>> from fw.models.bert import BertConfig
    >>> config = BertConfig(9, 8, 1, 2, 8, 0, task="embedding", pooling="cls")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_pooling(Path(folder), config)
    ...     read_pooling(Path(folder))
    {'pooling': 'cls', 'normalize': True}
    """
    kinds = [kind for kind in _MODULES if kind != "Normalize" or config.normalize]
    rows = [
        {"idx": i, "name": str(i), "path": _MODULES[kind], "type": f"{_PACKAGE}.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / MODULES).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    modes: dict[str, Any] = {mode: name == config.pooling for name, mode in _POOLINGS.items()}
    size = config.dim if hasattr(config, "dim") else config.hidden_size  # as DistilBERT has it
    (folder / POOLING).mkdir()
    text = json.dumps({"word_embedding_dimension": size, **modes}, indent=2)
    (folder / POOLING / CONFIG).write_text(f"{text}\n", encoding="utf-8")


def check_labels(labels: Sequence[str], where: object) -> tuple[str, ...]:
    """Returns the labels as a tuple if they are different, non-empty strings.

    >>> check_labels(["O", "O"], "labels")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: labels: expected different, non-empty names, got ['O', 'O']
    """
    named = all(isinstance(label, str) and label for label in labels)
    if not labels or isinstance(labels, str) or not named or len(set(labels)) < len(labels):
        raise FwError(f"{where}: expected different, non-empty names, got {shown(labels)}")
    return tuple(labels)


def _solves(problem: Any, task: str, outputs: int) -> bool:
    """Whether a classifier of texts is one for a task.

    Without a `problem_type`, transformers takes a single output for a number.
    """
    if problem is None:
        return task == "sequence_classification" or (task == "regression" and outputs == 1)
    return problem == PROBLEMS[task]


def _task_of(problem: Any, own: tuple[str, ...], where: object) -> str:
    """The task that a classifier of texts was made for."""
    if problem is None:
        return "regression" if len(own) == 1 else "sequence_classification"
    for task, name in PROBLEMS.items():
        if problem == name:
            return task
    raise FwError(
        f"{where}: problem_type {shown(problem)} is not supported; expected one of "
        f"{', '.join(PROBLEMS.values())}; with a task and labels given, a new classifier is made"
    )


def _own_labels(source: Mapping[str, Any], where: object, limit: int) -> tuple[str, ...]:
    table = source.get("id2label")
    if table is None:
        # The format's own defaults: two classes, without names.
        count = source.get("num_labels", 2)
        if not isinstance(count, int) or not 0 < count <= limit:
            raise FwError(f"{where}: num_labels {shown(count)} fits no tensor of the folder")
        return _unnamed(count)
    if not isinstance(table, dict) or set(table) != set(map(str, range(len(table)))):
        raise FwError(f"{where}: id2label: expected names by '0', '1' …, got {shown(table)}")
    return check_labels([table[str(i)] for i in range(len(table))], f"{where}: id2label")


def _unnamed(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count))


_NONE = object()
"""What a value of another kind or range becomes."""


def _checked(field: dataclasses.Field, value: Any, where: object, limit: int) -> Any:
    """A value of JSON as a field has it: of its type and, by its metadata, its range.

    Integers are from 1 to what the tensors bear out, numbers 0 or more; "unbounded" takes any
    integer of 32 bits, for one that sizes no array, and "signed" numbers and integers of any sign.
    """
    least, most = 1, limit
    if field.metadata.get("unbounded"):
        most = 2**31 - 1
    if signed := bool(field.metadata.get("signed")):
        least, most = -(2**31), 2**31 - 1
    found = _fitted(field.type, value, range(least, most + 1), signed)
    if found is not _NONE:
        return found
    wanted = _wanted(field.type, range(least, most + 1), signed)
    raise FwError(f"{where}: {field.name} is {shown(value)}; expected {wanted}")


def _fitted(kind: Any, value: Any, integers: range, signed: bool) -> Any:
    """The value as one of the kind, or `_NONE`."""
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if not isinstance(value, list):
            return _NONE
        if kinds[1:] == (...,):
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            return _NONE
        found = [_fitted(k, v, integers, signed) for k, v in zip(kinds, value, strict=True)]
        return _NONE if any(one is _NONE for one in found) else tuple(found)
    if choices := get_args(kind):
        found = (_fitted(choice, value, integers, signed) for choice in choices)
        return next((one for one in found if one is not _NONE), _NONE)
    if not _fits(kind, value, integers, signed):
        return _NONE
    return float(value) if kind is float else value


def _fits(kind: Any, value: Any, integers: range, signed: bool) -> bool:
    """Whether a value without parts is one of the kind."""
    number = isinstance(value, int | float) and not isinstance(value, bool)  # to Python, an int
    most = sys.float_info.max  # refuses infinity, nan, and integers too large for a float
    return {
        types.NoneType: value is None,
        bool: isinstance(value, bool),
        int: number and isinstance(value, int) and value in integers,
        float: number and (-most if signed else 0) <= value <= most,
        str: isinstance(value, str),
    }[kind]


def _wanted(kind: Any, integers: range, signed: bool) -> str:
    """The kind in words."""
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        some = " and ".join(_wanted(k, integers, signed) for k in kinds if k is not ...)
        return f"a list, each {some}" if kinds[1:] == (...,) else f"a list of {some}"
    kinds = get_args(kind) or (kind,)
    if bool in kinds:
        return "true or false"
    if float in kinds:
        return "a number" if signed else "a number, 0 or more"
    if int in kinds:
        reason = ", the largest that the tensors bear out" if integers[-1] < 2**31 - 1 else ""
        return f"an integer from {integers[0]} to {integers[-1]}{reason}"
    return _wanted(kinds[0], integers, signed) if get_args(kind) else "a string"
