"""Command-line options made from a frozen dataclass: one place for names, defaults and help."""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any, cast, get_args, get_origin

from fw.errors import FwError

COMPUTED: Mapping[str, str] = {
    "microbatches": "give --microbatches",
    "remat": "give --remat",
    "scan": "the mesh decides",
}
"""Fields of a config that say how a model is computed, and who says it."""


def check_choices(options: Any, choices: Mapping[str, Collection[str]]) -> None:
    """Refuses a field that is none of what it may be.

    Raises:
      FwError: its name, its value, and what was expected.
    """
    for name, known in choices.items():
        if (value := getattr(options, name)) not in known:
            raise FwError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")


def add_options(
    parser: argparse.ArgumentParser, record: type, *, without: Collection[str] = ()
) -> None:
    """Adds one option per field; its help is the field's line under `Attributes:`.

    A field `learning_rate: float = 5e-5` becomes `--learning-rate`, a boolean `--x / --no-x`.

    Args:
      parser: gets the options.
      record: a dataclass whose fields are str, int, float or bool, all of them described.
      without: fields that get no option: the program itself knows their values.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Recipe:
    ...     '''What to do.
    ...
    ...     Attributes:
    ...       seed: of everything.
    ...     '''
    ...
    ...     seed: int = 0
    >>> parser = argparse.ArgumentParser()
    >>> add_options(parser, Recipe)
    >>> read_options(parser.parse_args(["--seed", "3"]), Recipe)
    Recipe(seed=3)
    """
    text = descriptions(record)
    for field in dataclasses.fields(record):
        if field.name in without:
            continue
        flag = "--" + field.name.replace("_", "-")
        required = field.default is dataclasses.MISSING
        shown = "" if required or field.default == "" else f" (default: {field.default})"
        said = text[field.name].removesuffix(".") + shown
        options: dict[str, Any] = {"help": said.replace("%", "%%")}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            kind = cast(type, field.type)
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        # SUPPRESS, so that what the user gave can be told from a default.
        parser.add_argument(flag, default=argparse.SUPPRESS, required=required, **options)


def read_options[T](arguments: argparse.Namespace, record: type[T], **defaults: Any) -> T:
    """The record that parsed arguments spell.

    Args:
      arguments: from a parser with `add_options`.
      record: the same dataclass.
      defaults: stand where the user gave nothing.

    Raises:
      Exception: what the dataclass refuses its fields with.
    """
    names = {field.name for field in dataclasses.fields(record)}  # type: ignore[arg-type]
    given = {k: v for k, v in vars(arguments).items() if k in names}
    return record(**{**defaults, **given})


def read_fields[T](
    record: type[T], text: str, *, defaults: Mapping[str, Any] | None = None, **given: Any
) -> T:
    """The record of some fields and of others that a text spells, as in "depth=4,sizes=32/64".

    Args:
      record: a dataclass whose other fields are str, int, float, bool or tuples of one of them.
      text: name=value, parted by commas; the values of a tuple by slashes.
      defaults: fields in place of the record's own defaults.
      given: fields that the text may not change; nor may it change those in `COMPUTED`.

    Raises:
      FwError: a field that is not there, is given or says how a model is computed, or a value of
        another type.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Net:
    ...     inputs: int
    ...     sizes: tuple[int, ...] = (8,)
    ...     rate: float = 0.1
    >>> read_fields(Net, "sizes=32/64,rate=0", inputs=3)
    Net(inputs=3, sizes=(32, 64), rate=0.0)
    """
    fixed = {*given, *COMPUTED}
    own = {f.name: f.type for f in dataclasses.fields(record) if f.name not in fixed}  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for part in parted(text):
        name, _, value = map(str.strip, part.partition("="))
        if name in COMPUTED:
            raise FwError(f"config: {name} is no part of the model; {COMPUTED[name]}")
        if name not in own:
            raise FwError(f"config: there is no field {name!r}; expected {', '.join(own)}")
        try:
            found[name] = _read_value(own[name], value)
        except (ValueError, TypeError) as error:
            kind = own[name]
            kind = kind.__name__ if isinstance(kind, type) else kind
            raise FwError(f"config: {part!r}: expected a value of type {kind}") from error
    return record(**{**(defaults or {}), **given, **found})


def parted(text: str) -> tuple[str, ...]:
    """Names in an option, which commas part.

    >>> parted("age, sex,")
    ('age', 'sex')
    """
    return tuple(filter(None, map(str.strip, text.split(","))))


def _read_value(kind: Any, text: str) -> Any:
    if get_origin(kind) is tuple:
        return tuple(_read_value(get_args(kind)[0], part) for part in text.split("/") if part)
    for choice in get_args(kind) or (kind,):
        if choice is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if choice in (str, int, float):
            return choice(text)
    raise TypeError(kind)


def descriptions(record: type) -> dict[str, str]:
    """The `Attributes:` of a class and of those it extends, by name.

    >>> from fw.optimizer import AdamW
    >>> descriptions(AdamW)["clip"]
    'the largest global norm of the gradient; 0 for no clipping.'
    """
    found: dict[str, str] = {}
    for base in reversed(record.__mro__[:-1]):
        lines = inspect.cleandoc(base.__doc__ or "").partition("Attributes:")[2]
        for names, text in re.findall(r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", lines, re.MULTILINE):
            for name in names.split(", "):
                found[name] = " ".join(text.split())
    return found
