"""The two sides of a benchmark, fw and its peer: the same sentences, the same hyper-parameters.

Every measurement is a process of its own that prints one line of JSON, so that none finds the
memory, the threads or the caches of another. `finetune.py` and `ner_f1.py` are built on this.
"""

import dataclasses
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fw import assets, data, host
from fw.errors import FwError
from fw.recipe import Finetune, locate

BENCH = Path(__file__).resolve().parent
SPLITS = data.SPLITS


@dataclasses.dataclass(frozen=True)
class Training:
    """What both sides are given.

    Attributes:
      model: a name of `fw fetch --list`, or a Hugging Face model folder.
      data: a folder with train, dev and test files (CoNLL, JSON lines), or one file.
      batch: sentences a step; fw gets as many packed rows as hold so many on average.
      length: pieces a row of fw, and pieces a sentence is cut to by the peer.
      rows: of fw in a step; 0 to follow from batch.
      learning_rate: the peak; linear decay.
      weight_decay: on matrices.
      warmup: share of the steps in which the rate rises.
      peer: the command that runs the peer.
      tuned_malloc: start the peer with the malloc settings that fw.host gives to fw.
    """

    model: str = "all-MiniLM-L6-v2"
    data: str = ""
    batch: int = 32
    length: int = 64
    rows: int = 0
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    peer: str = str(BENCH / "peer")
    tuned_malloc: bool = False

    def __post_init__(self):
        """Checks what would fail only later."""
        if not self.data:
            raise FwError("data is missing; give --data a folder or a file")


def prepare[T: Training](options: T, folder: Path) -> T:
    """Writes the sentences for both sides as `FOLDER/{train,dev,test}.conll`, tags in BIO.

    Returns:
      The options with `data` that folder, `model` a folder too, and `rows` settled.
    """
    records = data.load_splits(locate(options.data), "token_classification")
    if "dev" not in records:
        records["train"], records["dev"] = data.hold_out(records["train"])
    if "test" not in records:
        raise FwError(f"{options.data}: has no test split")
    for split in SPLITS:
        sentences = (
            "".join(f"{word}\t{tag}\n" for word, tag in zip(r.words, r.tags, strict=True))
            for r in records[split]
        )
        (folder / f"{split}.conll").write_text("\n".join(sentences), "utf-8", newline="\n")
    source = assets.fetch(options.model)
    train = records["train"]
    encoded = data.encode_tagged(
        data.load_tokenizer(source), train, data.label_names(train), max_length=options.length
    )
    whole = data.pack(encoded, options.length).rows
    rows = options.rows or max(1, round(options.batch * whole / len(train)))
    return dataclasses.replace(options, data=str(folder), model=str(source.resolve()), rows=rows)


def recipe(options: Training, **more: Any) -> Finetune:
    """The fw side of prepared options."""
    return Finetune(
        task="ner", model=options.model, data=options.data, batch=options.rows,
        length=options.length, learning_rate=options.learning_rate,
        weight_decay=options.weight_decay, warmup=options.warmup, **more,
    )  # fmt: skip


def peer(options: Training, *more: str) -> dict[str, Any]:
    """Runs the peer on prepared options.

    Args:
      options: from `prepare`.
      *more: further arguments of `peer_ner.py`.
    """
    files = [f"--{split}={options.data}/{split}.conll" for split in SPLITS]
    return process(
        [
            *shlex.split(options.peer),
            *files,
            f"--model={options.model}",
            f"--batch-size={options.batch}",
            f"--max-length={options.length}",
            f"--lr={options.learning_rate}",
            f"--weight-decay={options.weight_decay}",
            f"--warmup-ratio={options.warmup}",
            *more,
        ],
        tunables=host.MALLOC if options.tuned_malloc else None,
    )


def arguments(options: Any) -> list[str]:
    """The command line that `fw.options` reads as these options."""
    given = dataclasses.asdict(options)
    return [
        f"--{'' if value is not False else 'no-'}{name.replace('_', '-')}"
        + ("" if isinstance(value, bool) else f"={value}")
        for name, value in given.items()
    ]


def process(command: Sequence[str], tunables: str | None = None) -> dict[str, Any]:
    """Runs a command and returns the last line that it prints, parsed.

    Args:
      command: a program and its arguments.
      tunables: its `GLIBC_TUNABLES`; None for none, so that fw sets its own.
    """
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FwError(f"{shlex.join(command)}: status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def digest(options: Training) -> str:
    """SHA-256 of the sentences and the weights, so that a result names what it is of."""
    sha = hashlib.sha256()
    files = [Path(options.data, f"{split}.conll") for split in SPLITS]
    for path in (*files, *sorted(Path(options.model).glob("*.safetensors"))):
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return {
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "load_before": os.getloadavg()[0],
    }
