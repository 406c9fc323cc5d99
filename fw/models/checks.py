"""What the configs of models check before anything is computed, in the same words."""

from collections.abc import Collection
from typing import Any

from fw.errors import FwError


def one_of(config: object, **choices: Collection[Any]) -> None:
    """Refuses a field that is none of its choices.

    Raises:
      FwError: such a field.

    >>> from fw.models.unet import UNetConfig
    >>> UNetConfig(2, norm="layer")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: norm 'layer' is unknown; choose one of batch, none
    """
    for name, known in choices.items():
        if (given := getattr(config, name)) not in known:
            choice = ", ".join(map(str, known))
            raise FwError(f"{name} {given!r} is unknown; choose one of {choice}")


def at_least(config: object, least: int, *names: str) -> None:
    """Refuses a field that is less, or a tuple of which a part is.

    Raises:
      FwError: such a field.

    >>> from fw.models.unet import UNetConfig
    >>> UNetConfig(2, depth=0)
    Traceback (most recent call last):
    ...
    fw.errors.FwError: depth is 0; expected 1 or more
    """
    for name in names:
        value = getattr(config, name)
        if min(value if isinstance(value, tuple) else (value,), default=least) < least:
            raise FwError(f"{name} is {value}; expected {least} or more")


def rates(config: object, *names: str) -> None:
    """Refuses a field that is no share of what can be left out; None is one that is not given.

    Raises:
      FwError: such a field.

    >>> from fw.models.unet import UNetConfig
    >>> UNetConfig(2, dropout=1.0)
    Traceback (most recent call last):
    ...
    fw.errors.FwError: dropout 1.0 is no rate; expected 0 or more, and less than 1
    """
    for name in names:
        rate = getattr(config, name)
        if rate is not None and not 0 <= rate < 1:
            raise FwError(f"{name} {rate} is no rate; expected 0 or more, and less than 1")
