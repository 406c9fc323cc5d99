"""Smaller arrays, same function: compressed parameter trees and the interpreter that reads them.

Transforms such as `quantize` replace chosen leaves of a parameter tree by compressed arrays, and
`chain` joins them; `apply` makes any pure function understand the result. The guide is `README.md`.
"""

from compress.arrays import Compressed, Quantized, dequantize, is_compressed, specs
from compress.interpreter import apply
from compress.quantize import quantize
from compress.recipe import dumps, loads
from compress.scheme import Scheme, fit
from compress.serialize import from_arrays, to_arrays
from compress.transform import Record, Transform, chain, match

__all__ = [
    "Compressed",
    "Quantized",
    "Record",
    "Scheme",
    "Transform",
    "apply",
    "chain",
    "dequantize",
    "dumps",
    "fit",
    "from_arrays",
    "is_compressed",
    "loads",
    "match",
    "quantize",
    "specs",
    "to_arrays",
]
