"""Text in, text out, as it comes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from tokenizers.decoders import DecodeStream

from fw.data.tokenizer import Tokenizer, load_tokenizer
from fw.errors import FwError
from fw.generation.decode import Decoder, decode
from fw.generation.sampling import Sampling
from fw.generation.speculate import speculate
from fw.hub import Loaded
from fw.hub.files import read_json

GENERATION = "generation_config.json"
"""Where a folder says what ends a text, if not in its `config.json`."""

WORTHWHILE = 300
"""Tokens from which on a CPU is faster with layers apart, compiling included: SmolLM2 compiles
6.9 s longer, and takes 23 ms less a token (scripts/bench/decode.py)."""


@dataclass
class _Text:
    """A text that grows: its tokens are spelled, and a stop in it ends it.

    How a token is spelled depends on those before it: a SentencePiece tokenizer leaves out the
    space before the very first.
    """

    tokenizer: Tokenizer
    stops: Sequence[str]
    prompt: Sequence[int] = ()
    text: str = ""
    given: int = 0
    ended: bool = False
    stream: Any = field(init=False)

    def __post_init__(self) -> None:
        # Of ids that end within a character nothing can be said yet.
        whole = not self.tokenizer.fast.decode([*self.prompt]).endswith("\N{REPLACEMENT CHARACTER}")
        self.stream = DecodeStream([*self.prompt] if whole else [], skip_special_tokens=True)

    def add(self, token: int | None) -> None:
        if self.ended:
            return
        if token is None:
            self.ended = True
            return
        self.text += self.stream.step(self.tokenizer.fast, token) or ""
        ends = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if ends:
            self.text, self.ended = self.text[: min(ends)], True

    def news(self, last: bool) -> str:
        """What is certain by now: no part of a stop that may still come."""
        sure = len(self.text)
        if not (last or self.ended):
            held = (
                size
                for stop in self.stops
                for size in range(1, len(stop))
                if self.text.endswith(stop[:size])
            )
            sure -= max(held, default=0)
        news, self.given = self.text[self.given : sure], max(self.given, sure)
        return news


def generate(
    loaded: Loaded,
    prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop: str | Sequence[str] = (),
    draft: Loaded | None = None,
    precision: str = "f32",
    cache: str = "f32",
    on_news: Callable[[int, str], None] | None = None,
) -> Any:
    """Continues texts.

    Args:
      loaded: a decoder, as `fw.load` gives it; its folder brings the tokenizer.
      prompts: a text or its ids (`fw.data.Chat(...).prompt`), or several.
      max_tokens: of each text.
      sampling: of all texts or of each; None takes the likeliest token always.
      stop: strings that end a text, which are left out.
      draft: a smaller model with the same tokenizer, which guesses tokens ahead; the output is
        the same (`speculate`).
      precision: of the dots, "f32" or "bf16".
      cache: what keys and values of the texts are kept as, "f32" or "int8" (`Decoder`).
      on_news: is told `(number of the text, what came)` as it comes.

    Returns:
      The continuation, or a list of them.

    Raises:
      FwError: a model without a tokenizer, a text too long, a setting out of range.

    >>> generate(load("SmolLM2-135M-Instruct"), "The capital of France is")  # doctest: +SKIP
    ' Paris.'
    """
    if loaded.folder is None:
        raise FwError("the model came from no folder, so it has no tokenizer")
    tokenizer = load_tokenizer(loaded.folder)
    alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    given: Sequence[Any] = [prompts] if alone else prompts
    ids = [encode(tokenizer, p) if isinstance(p, str) else [*p] for p in given]
    if sampling is None or isinstance(sampling, Sampling):
        sampling = [sampling or Sampling()] * len(ids)
    if len(sampling) != len(ids):
        raise FwError(f"{len(ids)} texts, but {len(sampling)} settings of sampling")
    stops = [stop] if isinstance(stop, str) else [*stop]
    if not all(stops):
        raise FwError("stop: expected strings of one character at least")

    ends = end_tokens(loaded, tokenizer)
    texts = [_Text(tokenizer, stops, prompt) for prompt in ids]
    told = on_news or (lambda number, news: None)
    for step in _steps(loaded, draft, ids, sampling, max_tokens, ends, precision, cache):
        for number, (text, token) in enumerate(zip(texts, step, strict=True)):
            text.add(None if token in ends else token)
            if news := text.news(last=False):
                told(number, news)
        if all(text.ended for text in texts):
            break
    for number, text in enumerate(texts):
        if news := text.news(last=True):
            told(number, news)
    found = [text.text for text in texts]
    return found[0] if alone else found


def _steps(
    loaded: Loaded,
    draft: Loaded | None,
    ids: Sequence[Sequence[int]],
    settings: Sequence[Sampling],
    most: int,
    stops: Sequence[int],
    policy: str,
    cache: str,
) -> Iterator[list[int | None]]:
    def of(one: Loaded) -> Decoder:
        return Decoder(one.model, one.variables, one.mesh, one.rules, policy, cache)

    decoder = of(loaded)
    if draft is not None:
        return speculate(decoder, of(draft), ids, settings, most=most, stops=stops)
    if jax.default_backend() == "cpu" and most >= WORTHWHILE and decoder.model.config.scan:
        decoder = decoder.apart()
    return decode(decoder, ids, settings, most=most, stops=stops)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of the beginning of a text: without what would end it."""
    return [*tokenizer.prefix, *tokenizer.fast.encode(text, add_special_tokens=False).ids]


def end_tokens(loaded: Loaded, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text, by all that the folder says."""
    found: list[Any] = [loaded.config.get("eos_token_id")]
    path = Path(loaded.folder or "") / GENERATION
    if path.is_file():
        found.append(read_json(path).get("eos_token_id"))
    flat = [n for entry in found for n in (entry if isinstance(entry, list) else [entry])]
    ends = {n for n in flat if isinstance(n, int)}
    if tokenizer.end is not None:
        ends.add(tokenizer.end)
    return tuple(sorted(ends))
