"""Milliseconds a generated token, greedy: fw with layers stacked, apart, in int8; transformers.

The same folder and prompt; transformers' `generate` in float32 is the peer. Sides take turns, round
after round. Compiling is told apart: it is what the first call takes longer. The greedy tokens of
both in float32 are compared.

    .venv/bin/python scripts/bench/decode.py
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import compress
import fw
from fw import data, report
from fw.generation import Decoder, Sampling, decode

BENCH = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="a decoder")
    parser.add_argument("--prompt", default="Once upon a time", help="to go on with")
    parser.add_argument("--tokens", type=int, default=60, help="to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        loaded = fw.load(arguments.model)
        fw.save(root / "model", loaded)
        ids = data.load_tokenizer(root / "model").fast.encode(arguments.prompt).ids
        (root / "prompt.json").write_text(json.dumps({"ids": ids, "tokens": arguments.tokens}))
        stacked = Decoder(loaded.model, loaded.variables)
        small, _ = compress.quantize("int8")(loaded.variables["params"])
        int8 = dataclasses.replace(stacked, variables={**loaded.variables, "params": small})
        sides: dict[str, Any] = {"fw, stacked": stacked, "fw, apart": stacked.apart(),
                                 "fw, apart, int8": int8.apart()}  # fmt: skip
        firsts = {name: once(side, ids, arguments.tokens) for name, side in sides.items()}
        found: dict[str, list[float]] = {name: [] for name in [*sides, "transformers"]}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                found[name].append(once(side, ids, arguments.tokens)["ms"])
            subprocess.run([BENCH / "peer", "peer_language.py", "generate", root], check=True)
            theirs = json.loads((root / "generated.json").read_text())
            found["transformers"].append(theirs["ms"])
    base = statistics.median(found["transformers"])
    rows = [
        (name, f"{statistics.median(ms):.1f}", f"{min(ms):.1f}–{max(ms):.1f}",
         f"{base / statistics.median(ms):.2f}",
         f"{firsts[name]['first']:.1f}" if name in firsts else "")
        for name, ms in found.items()
    ]  # fmt: skip
    print(report.table(rows, ("", "ms a token", "range", "times the peer", "first token, s")))
    same = firsts["fw, stacked"]["tokens"] == theirs["tokens"]
    print(f"greedy tokens: {'the same' if same else 'NOT the same'} as transformers'")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2))
    return 0


def once(decoder: Decoder, ids: list[int], count: int) -> dict[str, Any]:
    """The tokens; seconds to the first; milliseconds for each of the second half."""
    began, times, tokens = time.perf_counter(), [], []
    for (token,) in decode(decoder, [ids], [Sampling()], most=count):
        times.append(time.perf_counter())
        tokens.append(token)
    half = count // 2
    ms = 1e3 * (times[-1] - times[half]) / (count - 1 - half)
    return {"tokens": tokens, "first": times[0] - began, "ms": ms}


if __name__ == "__main__":
    sys.exit(main())
