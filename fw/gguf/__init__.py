"""GGUF, llama.cpp's format: one file with the config, the tensors and the tokenizer."""

from fw.gguf.header import parse
from fw.gguf.model import Gguf, GgufTensor, gguf_file, open_gguf
from fw.gguf.tokenizer import read_tokenizer, write_tokenizer

__all__ = [
    "Gguf",
    "GgufTensor",
    "gguf_file",
    "open_gguf",
    "parse",
    "read_tokenizer",
    "write_tokenizer",
]
