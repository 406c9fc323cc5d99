"""Values as short text with their units, the same in the report and on the terminal."""

import math
import re

MISSING = "–"

# Controls (a terminal would obey some), and what HTML and UTF-8 cannot hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_DECADES = ("", "k", "M", "G", "T", "P")


def clean(text: str) -> str:
    """Replace what cannot be shown (controls, lone surrogates) by U+FFFD; keep tab and newline.

    >>> clean("a\\x1b[31mb") == "a\\ufffd[31mb"
    True
    """
    return _UNPRINTABLE.sub("\ufffd", text)


def number(value: float | None, digits: int = 4) -> str:
    """Print a number with some significant digits, `MISSING` for None and what is not finite.

    >>> number(0.123456), number(3e-5), number(12345.6), number(None)
    ('0.1235', '3e-5', '12,346', '–')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if 10 ** (digits - 1) <= abs(value) < 1e15:
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def compact(value: float) -> str:
    """Print the label of a tick: thousands as k, small numbers with an exponent.

    >>> compact(12000), compact(0.25), compact(2e-5), compact(0.0), compact(-1.5)
    ('12k', '0.25', '2e-5', '0', '-1.5')
    """
    if value == 0:
        return "0"
    decade = min(int(math.log10(abs(value)) // 3), len(_DECADES) - 1)
    if decade > 0:
        return f"{value / 1000**decade:.4g}{_DECADES[decade]}"
    return number(value)


def percent(value: float | None) -> str:
    """Print a fraction as a percentage.

    >>> percent(0.7126), percent(None)
    ('71.3 %', '–')
    """
    return MISSING if value is None else f"{100 * value:.1f} %"


def size(value: float | None) -> str:
    """Print a number of bytes in decimal units.

    >>> size(22_900_000), size(999), size(12_340)
    ('22.9 MB', '999 B', '12.3 kB')
    """
    if value is None:
        return MISSING
    decade = 0
    while value >= 999.5 and decade < len(_DECADES) - 1:
        value, decade = value / 1000, decade + 1
    return f"{value:.3g} {_DECADES[decade]}B"


def seconds(value: float | None) -> str:
    """Print a duration.

    >>> seconds(0.0123), seconds(7.26), seconds(192), seconds(3840)
    ('12.3 ms', '7.3 s', '3 min 12 s', '1 h 04 min')
    """
    if value is None:
        return MISSING
    if value < 0.9995:
        return f"{1000 * value:.3g} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"
