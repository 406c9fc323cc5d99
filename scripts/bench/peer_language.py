"""The peer's side of language.py and decode.py: perplexity, a loss curve, and greedy tokens.

scripts/bench/peer peer_language.py perplexity FOLDER    # FOLDER/model, windows.npz
scripts/bench/peer peer_language.py train FOLDER         # FOLDER/model, steps.npz, training.json
scripts/bench/peer peer_language.py generate FOLDER      # FOLDER/model, prompt.json
"""

# pyright: reportMissingImports=false
# (torch and transformers live in the peer's environment only)

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers


def load(root):
    return transformers.AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)


def perplexity(root):
    model, ids = load(root).eval(), torch.tensor(np.load(root / "windows.npz")["ids"]).long()
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(ids), 4):
            part = ids[i : i + 4]
            logits = model(input_ids=part).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(
                logits, part[:, 1:].flatten(), reduction="none"
            )
            total += loss.double().sum().item()
    count = ids.shape[0] * (ids.shape[1] - 1)
    (root / "perplexity.json").write_text(json.dumps(math.exp(total / count)))


def train(root):
    """Rows of one text each; a row that is not full ends in padding."""
    model, steps = load(root).train(), np.load(root / "steps.npz")
    told = json.loads((root / "training.json").read_text())
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(
        groups, lr=told["learning_rate"], betas=(told["b1"], told["b2"]), eps=told["eps"],
        weight_decay=told["weight_decay"],
    )  # fmt: skip
    losses = []
    for ids, segments, targets in zip(
        steps["input_ids"], steps["segment_ids"], steps["targets"], strict=True
    ):
        if segments.max() > 1:
            raise SystemExit("a row of several texts: transformers would let them see each other")
        logits = model(
            input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(segments).long()
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(targets).long().flatten(), ignore_index=-1
        )
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), told["clip"])
        adam.step()
        losses.append(loss.item())
    (root / "losses.json").write_text(json.dumps(losses))


class Clock(transformers.generation.streamers.BaseStreamer):
    """When each token came."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def generate(root):
    """Greedy, to the end, in float32; milliseconds for each token of the second half."""
    model, told = load(root).eval(), json.loads((root / "prompt.json").read_text())
    ids, count = torch.tensor([told["ids"]]), told["tokens"]
    for _ in range(2):  # the first warms up
        clock = Clock()
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                min_new_tokens=count, streamer=clock, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
    times, half = clock.times[1:], count // 2  # the prompt comes first
    ms = 1e3 * (times[-1] - times[half]) / (count - 1 - half)
    tokens = out[0, len(told["ids"]) :].tolist()
    (root / "generated.json").write_text(json.dumps({"ms": ms, "tokens": tokens}))


if __name__ == "__main__":
    {"perplexity": perplexity, "train": train, "generate": generate}[sys.argv[1]](Path(sys.argv[2]))
