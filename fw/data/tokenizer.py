"""A tokenizer is read from a model's folder: data, never code.

`tokenizer.json`, or BERT's `vocab.txt`, by the `tokenizers` library. `encode` uses it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from fw.data.files import read_text
from fw.errors import FwError

CHAT_TEMPLATE = "chat_template.jinja"
"""The file that newer models keep it in."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer without padding or truncation, and the special tokens it puts around a text.

    Args:
        fast: the `tokenizers.Tokenizer`.
        prefix: ids before a text, [CLS] for BERT.
        suffix: ids after it, [SEP] for BERT.
        pad: id for padding.
        unknown: id for a word without a single piece; None where the vocabulary has none.
        settings: what `tokenizer_config.json` says, the chat template included.
        mask: id that stands for a word to be guessed; None where the vocabulary has none.
        spaced: a word is told from the rest of another by the space before it, as in RoBERTa's
            byte-level BPE; words that are given one by one need one put there.
    """

    fast: tokenizers.Tokenizer
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad: int
    unknown: int | None
    mask: int | None = None
    spaced: bool = False
    settings: Mapping[str, Any] = field(default=MappingProxyType({}), repr=False)

    @property
    def end(self) -> int | None:
        """The id that ends a text, where the settings say one."""
        token = _spelling(dict(self.settings), "eos_token")
        return None if token is None else self.fast.token_to_id(token)

    def words(self, words: Iterable[str]) -> list[str]:
        """Words as `fast` has to be given them to make the pieces that running text has."""
        return [f" {word}" for word in words] if self.spaced else list(words)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a tokenizer from a model folder.

    `tokenizer.json` is taken if it is there, else `vocab.txt` as BERT's WordPiece, lower-casing
    as `tokenizer_config.json` says (without one: yes, as transformers' BertTokenizer), else that
    of a GGUF file. Padding and truncation that the file carries are switched off, and text that
    spells a special token ("[SEP]") is read as text, so that no input can forge one.

    Args:
        folder: the folder of the model or artifact.

    Returns:
        the tokenizer.

    Raises:
        FwError: neither file is there, or one cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "vocab.txt").write_text("[PAD]\\n[UNK]\\n[CLS]\\n[SEP]\\nhello\\n")
    ...     tokenizer = load_tokenizer(folder)
    >>> tokenizer.prefix, tokenizer.suffix, tokenizer.fast.encode("Hello").ids
    ((2,), (3,), [2, 4, 3])
    """
    folder = Path(folder)
    config = _read_config(folder / "tokenizer_config.json")
    if (folder / CHAT_TEMPLATE).is_file():
        config["chat_template"] = read_text(folder / CHAT_TEMPLATE)
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        fast = _from_json(path, read_text(path))
    elif (folder / "vocab.txt").is_file():
        fast = _word_piece(folder / "vocab.txt", config)
    else:
        from fw import gguf  # not for artifacts, which answer without any model's code

        if (file := gguf.gguf_file(folder)) is None:
            raise FwError(f"{folder}: expected tokenizer.json or vocab.txt; found neither")
        text, config = gguf.read_tokenizer(file)
        fast = _from_json(file, text)

    fast.no_padding()
    fast.no_truncation()
    fast.encode_special_tokens = True
    probe = fast.encode("a")
    inside = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    if not inside:
        raise FwError(f"{folder}: the tokenizer makes nothing of the letter 'a'")
    pad = _token_id(fast, config, "pad_token", "[PAD]", "<pad>")
    return Tokenizer(
        fast,
        prefix=tuple(probe.ids[: inside[0]]),
        suffix=tuple(probe.ids[inside[-1] + 1 :]),
        # Any id will do where the vocabulary has none: segment 0 hides it.
        pad=0 if pad is None else pad,
        unknown=_token_id(fast, config, "unk_token", "[UNK]", "<unk>"),
        mask=_token_id(fast, config, "mask_token", "[MASK]", "<mask>"),
        spaced=_is_spaced(fast),
        settings=config,
    )


def _is_spaced(fast: tokenizers.Tokenizer) -> bool:
    """Whether the second word of a text gets other pieces by itself, and the same with a space."""

    def pieces(*words: str) -> list[int]:
        whole = {"is_pretokenized": True, "add_special_tokens": False}
        return fast.encode(list(words), **whole).ids

    running = fast.encode("a a", add_special_tokens=False).ids
    return pieces("a", "a") != running == pieces("a", " a")


def _from_json(path: Path, text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise FwError(f"{path}: not a tokenizer that can be read: {error}") from error


def _read_config(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        config = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FwError(f"{path}: expected a JSON object; {error}") from error
    if not isinstance(config, dict):
        raise FwError(f"{path}: expected a JSON object; got {type(config).__name__}")
    return config


def _word_piece(path: Path, config: dict) -> tokenizers.Tokenizer:
    """BERT's tokenizer from its vocabulary, one piece a line."""
    lines = read_text(path).removesuffix("\n").split("\n")
    vocabulary = {piece.rstrip("\r"): i for i, piece in enumerate(lines)}
    unknown = _spelling(config, "unk_token") or "[UNK]"
    first = _spelling(config, "cls_token") or "[CLS]"
    last = _spelling(config, "sep_token") or "[SEP]"
    for token in (unknown, first, last):
        if token not in vocabulary:
            raise FwError(f"{path}: expected a line {token}; found none")
    lower_case = bool(config.get("do_lower_case", True))
    strip_accents = config.get("strip_accents")
    fast = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    fast.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=None if strip_accents is None else bool(strip_accents),
        lowercase=lower_case,
    )
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])],
    )
    return fast


def _spelling(config: dict, name: str) -> str | None:
    """A special token's text; newer files wrap it in an object."""
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _token_id(fast: tokenizers.Tokenizer, config: dict, name: str, *usual: str) -> int | None:
    """The id of a special token, by the config's spelling or a usual one."""
    for token in (_spelling(config, name), *usual):
        found = None if token is None else fast.token_to_id(token)
        if found is not None:
            return found
    return None
