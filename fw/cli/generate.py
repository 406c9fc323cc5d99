"""`fw generate`: text in the terminal, as it comes."""

import argparse
import dataclasses
import sys
from typing import Any

from fw.errors import FwError

_HELP = """\
Continue texts, or answer messages, with a decoder.

  fw generate SmolLM2-135M-Instruct "The capital of France is"
  fw generate SmolLM2-135M-Instruct --chat "Why is the sky blue?" --temperature 0.7 --top-p 0.9
  fw generate model/ - < prompts.txt             a text a line, in one batch
  fw generate big/ --draft small/ "Once"         the same output as without, sooner
  fw generate big/ --mesh tensor=8 "Once"        on 8 devices
  fw generate big/ --cache int8 "Once"           a quarter of the memory for what it has read
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "generate", help="continue texts", description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="a folder, a GGUF file, a name of fw fetch --list, hf:...")
    parser.add_argument("text", nargs="+", help="what to continue; - for a text a line of stdin")
    parser.add_argument("--chat", action="store_true", help="texts are messages to answer")
    parser.add_argument("--system", default="", help="the system's message of --chat")
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="of each text (default: %(default)s)"
    )
    parser.add_argument("--stop", action="append", default=[], help="ends a text; may be repeated")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="only the likeliest with this sum")
    parser.add_argument("--min-p", type=float, default=0.0, help="of the likeliest's probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1: none")
    parser.add_argument("--seed", type=int, default=0, help="of the first text, then one more each")
    parser.add_argument("--draft", default="", help="a smaller model that guesses ahead")
    parser.add_argument("--mesh", default="data=1", help="devices by axis (default: %(default)s)")
    parser.add_argument("--precision", default="f32", help="of the dots: f32 or bf16")
    parser.add_argument("--cache", default="f32", help="of keys and values: f32 or int8")
    parser.set_defaults(command=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Prints one text as it comes, several as they are done, each behind its prompt."""
    from fw.data import Chat, load_tokenizer
    from fw.generation import Sampling, generate
    from fw.pretrained import load

    first = Sampling(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p,
        arguments.repetition_penalty, arguments.seed,
    )  # fmt: skip
    if arguments.max_tokens < 1:
        raise FwError(f"max-tokens is {arguments.max_tokens}; expected 1 or more")
    texts = _texts(arguments.text)
    loaded = load(arguments.model, mesh=arguments.mesh)
    draft = load(arguments.draft, mesh=arguments.mesh) if arguments.draft else None
    prompts: list[Any] = texts
    if arguments.chat:
        chat = Chat(load_tokenizer(loaded.folder or ""))
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        prompts = [chat.prompt([*system, {"role": "user", "content": text}]) for text in texts]

    def write(number: int, news: str) -> None:
        if len(texts) == 1:
            sys.stdout.write(news)
            sys.stdout.flush()

    found = generate(
        loaded,
        prompts,
        max_tokens=arguments.max_tokens,
        sampling=[dataclasses.replace(first, seed=first.seed + i) for i in range(len(texts))],
        stop=arguments.stop,
        draft=draft,
        precision=arguments.precision,
        cache=arguments.cache,
        on_news=write,
    )
    if len(texts) == 1:
        print()
        return 0
    for text, more in zip(texts, found, strict=True):
        print(f"{text}\n→ {more.strip()}\n")
    return 0


def _texts(words: list[str]) -> list[str]:
    if words != ["-"]:
        return words
    lines = [line.rstrip("\n") for line in sys.stdin]
    texts = [line for line in lines if line]
    if not texts:
        raise FwError("standard input: expected a text a line; found none")
    return texts
