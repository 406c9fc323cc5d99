"""Quality, size and latency of compressed models, by recipe, beside their peers in the same run.

    .venv/bin/python scripts/bench/compression.py --model runs/wnut/model --task ner --data wnut17/

Of a fine-tuned folder, or a decoder's: fw in float32, bfloat16 and by each recipe; torch, ONNX
Runtime and OpenVINO in float32 and int8 (`peer_compress.py`), Qwix where it is installed
(`qwix_side.py`). Every side answers the whole test split and is then timed on a batch of 16 × 64
tokens, or of 16 images: each a process of its own, in turns, medians. `--picture` draws size and
latency against quality. More recipes of a decoder: `compress_language.py`.

The script is not called compress.py: beside the others, it would be what they import by that name.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fw import report
from fw.errors import FwError

HERE = Path(__file__).parent
METRIC = {"ner": "f1", "classify": "accuracy", "images": "accuracy", "lm": "perplexity"}
LESS = ("perplexity",)
"""Metrics of which less is better; the others are shares."""
PEERS = {
    "fw": [sys.executable, str(HERE / "compress_side.py")],
    "qwix": [sys.executable, str(HERE / "qwix_side.py")],
    "peers": [str(HERE / "peer"), "peer_compress.py"],
}


class Program:
    """Sides in processes that answer the name of one with the seconds that it took."""

    def __init__(self, name: str, options: argparse.Namespace, sides: str):
        self.name = name
        words = [*PEERS[name], "--serve", f"--model={options.model}", f"--task={options.task}"]
        words += [f"--data={options.data}", f"--batch={options.batch}", "--rounds=1"]
        words += [f"--length={options.length}", f"--calibration={options.calibration}"]
        words += [f"--limit={options.limit}"] + ([f"--sides={sides}"] if sides else [])
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)
        self.told = json.loads(self._line())

    def seconds(self, side: str) -> float:
        """Of one batch."""
        assert self.process.stdin is not None
        print(side, file=self.process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise FwError(f"{self.name}: ended with status {self.process.wait()}; see above")
        return line


@contextmanager
def program(name: str, options: argparse.Namespace, sides: str) -> Iterator[Program]:
    it = Program(name, options, sides)
    try:
        yield it
    finally:
        if it.process.poll() is None and it.process.stdin is not None:
            it.process.stdin.close()
            it.process.wait()


def classifiers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every side."""
    metric = METRIC[options.task]
    with ExitStack() as stack:
        there = [("fw", options.recipes), ("peers", options.peers)]
        if importlib.util.find_spec("qwix") and options.qwix:
            there.append(("qwix", ""))
        programs = [
            stack.enter_context(program(name, options, sides))
            for name, sides in there
            if sides or name == "qwix"
        ]
        every = [(p, side) for p in programs for side in p.told["sides"]]
        seconds: dict[tuple[str, str], list[float]] = {(p.name, s): [] for p, s in every}
        for number in range(options.rounds):
            turn = number % len(every)
            for p, side in [*every[turn:], *every[:turn]]:
                seconds[p.name, side].append(p.seconds(side))
    rows = []
    for p, side in every:
        told = p.told["sides"][side]
        own = seconds[p.name, side]
        rows.append(
            {
                "by": p.name, "side": side,
                metric: told["quality"][metric] * (1 if metric in LESS else 100),
                "MB": told["bytes"] / 1e6, "ms": 1e3 * statistics.median(own),
                "fastest": 1e3 * min(own), "how": told["how"],
            }
        )  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="folder of a fine-tuned model")
    add("--task", choices=METRIC)
    add("--data", type=Path, help="folder of its data")
    add("--recipes", default="f32,bf16,int8,int8-static,int8-weights,int4,int4-nearest")
    add("--peers", default="torch,torch-int8,ort,ort-int8,openvino,openvino-int8")
    add("--qwix", action="store_true", help="measure it, too; it must be installed")
    add("--batch", type=int, default=16)
    add("--length", type=int, default=64, help="tokens of a row")
    add("--rounds", type=int, default=20, help="timed batches of each (default: %(default)s)")
    add("--calibration", type=int, default=16, help="training batches (default: %(default)s)")
    add("--limit", type=int, default=0, help="judge by so many test examples; 0 for all")
    add("--json", type=Path, help="write the rows to this file")
    add("--picture", type=Path, help="draw them to this SVG file")
    options = parser.parse_args()
    if not (options.model and options.task and options.data):
        parser.error("--model, --task and --data go together")
    try:
        rows = classifiers(options)
    except FwError as error:
        print(f"compression: {error}", file=sys.stderr)
        return 1
    shown = [k for k in rows[0] if k != "how"]
    print(report.table([[_cell(r[k]) for k in shown] for r in rows], shown))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.picture:
        options.picture.write_text(picture(rows, METRIC[options.task]))
    return 0


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def picture(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Size and latency of every side against its quality, as SVG; those on the front are joined.

    A side is on the front if none is as good and smaller (faster).
    """
    width, height, pad = 520, 340, 54
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {height}">',
        "<style>text { font: 11px sans-serif }</style>",
        f'<rect width="{2 * width}" height="{height}" fill="white"/>',
    ]
    sign = -1 if metric in LESS else 1
    best = [sign * r[metric] for r in rows]
    low, high = min(best), max(best)
    room = max(high - low, 0.2) * 0.12
    for panel, unit in enumerate(("MB", "ms")):
        left = panel * width
        most = 1.12 * max(r[unit] for r in rows)

        def at(row: dict[str, Any], left=left, most=most, unit=unit) -> tuple[float, float]:
            x = left + pad + (width - 2 * pad) * row[unit] / most
            share = (sign * row[metric] - low + room) / (high - low + 2 * room)
            return x, height - pad - (height - 2 * pad) * share

        x0, x1, y0, y1 = left + pad, left + width - pad, height - pad, pad
        parts.append(f'<path d="M{x0} {y1}V{y0}H{x1}" fill="none" stroke="#888"/>')
        parts.append(f'<text x="{x1}" y="{y0 + 32}" text-anchor="end">{unit}</text>')
        label = f"{metric}, less is better" if metric in LESS else f"{metric}, percent"
        parts.append(f'<text x="{x0}" y="{y1 - 12}">{label}</text>')
        for k in range(5):
            x, value = x0 + (x1 - x0) * k / 4, most * k / 4
            parts.append(f'<text x="{x:.0f}" y="{y0 + 15}" text-anchor="middle">{value:.0f}</text>')
            level = sign * (low - room + (high - low + 2 * room) * k / 4)
            y = y0 - (y0 - y1) * k / 4
            parts.append(f'<text x="{x0 - 6}" y="{y:.0f}" text-anchor="end">{level:.1f}</text>')
        front = [
            r
            for r in rows
            if not any(
                o[unit] <= r[unit] and sign * o[metric] >= sign * r[metric] and o is not r
                and (o[unit], o[metric]) != (r[unit], r[metric])
                for o in rows
            )
        ]  # fmt: skip
        line = " ".join(
            f"{x:.1f},{y:.1f}" for x, y in map(at, sorted(front, key=lambda r: r[unit]))
        )
        parts.append(f'<polyline points="{line}" fill="none" stroke="#1b6" stroke-width="1.5"/>')
        for row in rows:
            (x, y), own = at(row), row["by"] == "fw"
            colour = "#15c" if own else "#c51"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            place = f'x="{x + 6:.1f}" y="{y - 5:.1f}" fill="{colour}"'
            parts.append(f"<text {place}>{row['side']}</text>")
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    sys.exit(main())
