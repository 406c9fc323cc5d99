"""Smaller arrays, same function: compressed parameter trees and the interpreter that reads them.

`quantize` replaces chosen leaves of a parameter tree by `Int8` arrays; `apply` makes any pure
function understand them. The guide is `README.md`.
"""

from compress.arrays import Int8
from compress.int8 import DEFAULT_SELECT, dequantize, quantize, specs
from compress.interpreter import apply
from compress.serialize import from_arrays, to_arrays
from compress.transform import Record, match

__all__ = [
    "DEFAULT_SELECT",
    "Int8",
    "Record",
    "apply",
    "dequantize",
    "from_arrays",
    "match",
    "quantize",
    "specs",
    "to_arrays",
]
