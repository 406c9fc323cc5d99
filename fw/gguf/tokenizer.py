"""The tokenizer of a GGUF file in the form of `tokenizer.json` and `tokenizer_config.json`.

The file has its vocabulary and merges, and the name of how text is cut before they apply; or, of a
SentencePiece tokenizer, scores.
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
_NORMAL, _CONTROL, _USER = 1, 3, 4  # llama.cpp's types of tokens
_LONGEST = 256
"""Characters of a piece that others make up; SentencePiece's own limit is 16, if none is set."""


def build_tokenizer(path: Path, fields: Mapping[str, Any]) -> str:
    """The `tokenizer.json` of a file: byte-level BPE, as GPT-2's, or SentencePiece's, as Llama 2's.

    Raises:
      FwError: another kind.
    """
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    known = {"gpt2": ("default", "gpt-2", "smollm", *_CUTS), "llama": ("default",)}
    if cut not in known.get(kind if isinstance(kind, str) else "", ()):
        expected = "; ".join(f"{kind!r} cut by {', '.join(cuts)}" for kind, cuts in known.items())
        raise FwError(
            f"{path}: a tokenizer {shown(kind)} cut by {shown(cut)} is not supported; expected "
            f"{expected}; use the model's folder with tokenizer.json"
        )
    tokens, kinds = _strings(fields, "tokens"), fields.get("tokenizer.ggml.token_type")
    if not (
        tokens is not None
        and isinstance(kinds, list)
        and len(kinds) == len(tokens) == len(set(tokens))
    ):
        raise FwError(f"{path}: tokenizer.ggml: expected different tokens, a token_type for each")
    try:
        if kind == "llama":
            fast = _sentence_piece(path, fields, tokens, kinds)
        else:
            fast = _byte_level(path, fields, tokens, cut)
    except FwError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise FwError(f"{path}: not a tokenizer that can be read: {error}") from error
    for chosen in (_CONTROL, _USER):
        added = [token for token, kind in zip(tokens, kinds, strict=True) if kind == chosen]
        special = chosen == _CONTROL
        fast.add_tokens([AddedToken(t, normalized=False, special=special) for t in added])
    first = fields.get("tokenizer.ggml.bos_token_id")
    if fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or cut == "llama-bpe"):
        if not isinstance(first, int) or not 0 <= first < len(tokens):
            raise FwError(f"{path}: tokenizer.ggml.bos_token_id is {shown(first)}, no token's")
        fast.post_processor = processors.TemplateProcessing(
            single=f"{tokens[first]} $A",
            pair=f"{tokens[first]} $A $B:1",
            special_tokens=[(tokens[first], first)],
        )
    return fast.to_str(pretty=True)


def _byte_level(path: Path, fields: Mapping[str, Any], tokens: list[str], cut: str) -> Tokenizer:
    merges = _strings(fields, "merges")
    if merges is None or any(merge.count(" ") != 1 for merge in merges):
        raise FwError(f"{path}: tokenizer.ggml.merges: expected pairs of tokens")
    pairs = [(a, b) for a, b in (merge.split(" ") for merge in merges)]
    fast = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))
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
    return fast


def _sentence_piece(
    path: Path, fields: Mapping[str, Any], tokens: list[str], kinds: list[Any]
) -> Tokenizer:
    """BPE over characters (Kudo and Richardson 2018, arXiv:1808.06226), "▁" for a space.

    The file has a score for each piece: of all neighbours that make a piece, those with the best
    become one first. So its merges are all pairs of pieces that make another, the best first.
    """
    scores = fields.get("tokenizer.ggml.scores")
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    if not (
        isinstance(scores, list)
        and len(scores) == len(tokens)
        and all(isinstance(score, float) for score in scores)
    ):
        raise FwError(f"{path}: tokenizer.ggml.scores: expected a number for each token")
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise FwError(f"{path}: tokenizer.ggml.unknown_token_id is {shown(unknown)}, no token's")
    if fields.get("tokenizer.ggml.remove_extra_whitespaces", False):
        raise FwError(f"{path}: tokenizer.ggml.remove_extra_whitespaces is not supported")
    pieces = {
        t: i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _NORMAL
    }
    if long := next((piece for piece in pieces if len(piece) > _LONGEST), None):
        raise FwError(f"{path}: a token of {len(long)} characters; expected {_LONGEST} at most")
    merges = [
        (-scores[number], number, piece[:i], piece[i:])
        for piece, number in pieces.items()
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    ]
    fast = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(tokens)},
            [(a, b) for *_, a, b in sorted(merges)],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    spelled: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        spelled.append(decoders.Strip(" ", 1, 0))
    fast.normalizer = normalizers.Sequence(spaces)
    fast.decoder = decoders.Sequence(spelled)
    return fast


def _strings(fields: Mapping[str, Any], name: str) -> list[str] | None:
    found = fields.get(f"tokenizer.ggml.{name}")
    good = isinstance(found, list) and all(isinstance(one, str) for one in found)
    return found if good else None
