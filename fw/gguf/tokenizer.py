"""The tokenizer of a GGUF file in the form of `tokenizer.json` and `tokenizer_config.json`.

The file has its vocabulary and merges, and the name of how text is cut before they apply.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from fw.errors import FwError
from fw.gguf.header import parse


def write_tokenizer(path: Path, folder: Path) -> None:
    """Writes the tokenizer of a file as `tokenizer.json` and `tokenizer_config.json`.

    Raises:
      FwError: it is of a kind that is not known.
    """
    tokenizer, config = read_tokenizer(path)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(f"{text}\n", encoding="utf-8")


def read_tokenizer(path: Path) -> tuple[str, dict[str, Any]]:
    """What `write_tokenizer` writes: the text of `tokenizer.json`, and the settings."""
    fields, _ = parse(path)
    return build_tokenizer(path, fields), tokenizer_config(fields)


def tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a tokenizer in the form of `tokenizer_config.json`.

    >>> fields = {"tokenizer.ggml.tokens": ["a", "</s>"], "tokenizer.ggml.eos_token_id": 1}
    >>> tokenizer_config(fields)
    {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '</s>'}
    """
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokens = _strings(fields, "tokens") or []
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[f"{name}_token"] = tokens[number]
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        found["chat_template"] = template
    return found


# How text is cut before its bytes are merged, by `tokenizer.ggml.pre`; as llama.cpp has it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {"llama-bpe": _WORDS % "{1,3}", "qwen2": _WORDS % ""}
_CONTROL, _USER = 3, 4  # llama.cpp's types of tokens


def build_tokenizer(path: Path, fields: Mapping[str, Any]) -> str:
    """The `tokenizer.json` of a file: byte-level BPE, as GPT-2's.

    Raises:
      FwError: another kind.
    """
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    known = ("default", "gpt-2", "smollm", *_CUTS)
    if kind != "gpt2" or cut not in known:
        raise FwError(
            f"{path}: a tokenizer {shown(kind)} cut by {shown(cut)} is not supported; expected "
            f"'gpt2' and one of {', '.join(known)}; use the model's folder with tokenizer.json"
        )
    tokens, merges = _strings(fields, "tokens"), _strings(fields, "merges")
    kinds = fields.get("tokenizer.ggml.token_type")
    if not (
        tokens is not None
        and merges is not None
        and isinstance(kinds, list)
        and len(kinds) == len(tokens) == len(set(tokens))
        and all(merge.count(" ") == 1 for merge in merges)
    ):
        raise FwError(
            f"{path}: tokenizer.ggml: expected different tokens, a token_type for each, and merges "
            "of two"
        )
    pairs = [(a, b) for a, b in (merge.split(" ") for merge in merges)]
    try:
        fast = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))
    except Exception as error:  # the library raises nothing narrower
        raise FwError(f"{path}: not a tokenizer that can be read: {error}") from error
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut not in _CUTS)
    if cut in _CUTS:
        first = pre_tokenizers.Split(Regex(_CUTS[cut]), "isolated")
        fast.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    elif cut == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        fast.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        fast.pre_tokenizer = byte_level
    if cut == "qwen2":
        fast.normalizer = normalizers.NFC()
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER)
        ]
    )
    first = fields.get("tokenizer.ggml.bos_token_id")
    if fields.get("tokenizer.ggml.add_bos_token", cut == "llama-bpe"):
        if not isinstance(first, int) or not 0 <= first < len(tokens):
            raise FwError(f"{path}: tokenizer.ggml.bos_token_id is {shown(first)}, no token's")
        fast.post_processor = processors.TemplateProcessing(
            single=f"{tokens[first]} $A",
            pair=f"{tokens[first]} $A $B:1",
            special_tokens=[(tokens[first], first)],
        )
    return fast.to_str(pretty=True)


def _strings(fields: Mapping[str, Any], name: str) -> list[str] | None:
    found = fields.get(f"tokenizer.ggml.{name}")
    good = isinstance(found, list) and all(isinstance(one, str) for one in found)
    return found if good else None
