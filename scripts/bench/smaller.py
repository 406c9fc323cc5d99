"""Runs and what was made of them side by side: quality, numbers, bytes and latency of each.

    .venv/bin/python scripts/bench/smaller.py runs/bank runs/bank-half runs/bank-half:int8

The first is what the others are compared with. A variant after ":" is made if it is not there.
Every one answers the whole test split; then artifacts of all are timed in turns on a batch of
16 × 64 tokens (or 16 images), medians. Entries that are zero are counted as gone.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import compress
from compress.transform import named_leaves
from fw import report, stages
from fw.compare import compare


def side(name: str, folder: Path, split: str) -> dict[str, Any]:
    """What is known of one before it is timed; its artifact is in `folder`."""
    of, _, variant = name.partition(":")
    variant = variant or "f32"
    made = Path(of) / stages.COMPRESSED / variant
    if variant not in stages.PLAIN and not made.is_dir():
        stages.make_variant(of, variant)
    summary = stages.evaluate_run(of, split, name=variant)
    opened = stages.open_run(of)
    left = {"all": 0, "layers": 0}
    for path, leaf in named_leaves(stages.variant(opened, variant)[0]["params"])[0]:
        factors = isinstance(leaf, compress.Factored)
        parts = compress.dequantize((leaf.a, leaf.b) if factors else (leaf,))
        count = sum(int(np.count_nonzero(np.asarray(part))) for part in parts)
        left["all"] += count
        left["layers"] += count * ("layers" in path.split("/"))
    stages.export_run(of, name=variant, output=folder)
    return {"metric": summary.metric, "value": summary.figures, "left": left}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN[:VARIANT]")
    parser.add_argument("--metric", default="", help="a figure other than the task's own")
    parser.add_argument("--split", default="test")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folders = {name: Path(made) / str(i) for i, name in enumerate(options.runs)}
        known = {n: side(n, folder, options.split) for n, folder in folders.items()}
        timed = {row["name"]: row for row in compare(folders, repeats=options.repeats)}
    first = options.runs[0]
    metric = options.metric or known[first]["metric"]
    rows = []
    for name in options.runs:
        value, one = (100 * known[n]["value"][metric] for n in (name, first))
        cells = [f"{value:.2f}", f"{value - one:+.2f}"]
        for key in ("layers", "all"):
            left, whole = (known[n]["left"][key] for n in (name, first))
            cells.append(f"{left / whole:.3f}" if whole else "–")
        size, ms = (timed[name][k] for k in ("bytes", "latency_ms"))
        cells += [f"{size / 1e6:.1f}", f"{timed[first]['bytes'] / size:.2f}"]
        cells += [f"{ms:.1f}", f"{timed[first]['latency_ms'] / ms:.2f}"]
        rows.append((name, *cells))
    heads = (metric, "points", "of the layers", "of all", "MB", "times less", "ms", "times faster")
    print(report.table(rows, ("run", *heads)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
