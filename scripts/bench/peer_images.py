"""The peer's side of images.py: torch's ResNet of the same shape, from the same parameters.

scripts/bench/peer peer_images.py FOLDER    # FOLDER/model.json, model.npz, batches.npz

It answers lines: "train N" takes N steps, "infer N" N batches, each with {"seconds": ..., "loss":
...}, of the last step; "layout last" or "layout first" says where channels lie from then on.
"""

# pyright: reportMissingImports=false
# (torch lives in the peer's environment only)

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Unit(nn.Module):
    def __init__(self, size_in, size_out, window, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(size_in, size_out, window, stride, padding=window // 2, bias=False)
        self.norm = nn.BatchNorm2d(size_out)

    def forward(self, x):
        return self.norm(self.conv(x))


class Block(nn.Module):
    def __init__(self, size_in, size, stride):
        super().__init__()
        self.units = nn.ModuleList([Unit(size_in, size, 3, stride), Unit(size, size, 3)])
        projected = size_in != size or stride != 1
        self.shortcut = Unit(size_in, size, 1, stride) if projected else None

    def forward(self, x):
        y = self.units[1](functional.relu(self.units[0](x), inplace=True))
        y = y + (x if self.shortcut is None else self.shortcut(x))
        return functional.relu(y, inplace=True)


class ResNet(nn.Module):
    def __init__(self, told):
        super().__init__()
        self.stem = Unit(told["num_channels"], told["embedding_size"], 3)
        stages = {}
        for stage, _, before, after, stride in told["blocks"]:
            stages.setdefault(stage, []).append(Block(before, after, stride))
        self.stages = nn.ModuleList([nn.ModuleList(blocks) for blocks in stages.values()])
        self.classifier = nn.Linear(told["hidden_sizes"][-1], told["num_labels"])

    def forward(self, x):
        x = functional.relu(self.stem(x), inplace=True)
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        return self.classifier(x.mean((2, 3)))


def loaded(root, told):
    model, arrays = ResNet(told), np.load(root / "model.npz")
    state = {}
    for path in arrays.files:
        *place, last = path.split("/")
        name = ".".join([*place, "bias" if last == "bias" else "weight"])
        x = arrays[path]
        order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(x.ndim, range(x.ndim))
        state[name] = torch.tensor(x.transpose(order))
    missing, unknown = model.load_state_dict(state, strict=False)
    left = [name for name in missing if name.split(".")[-1] not in BUFFERS]
    if left or unknown:
        raise SystemExit(f"parameters without a value: {left}; without a place: {unknown}")
    return model


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def main(root):
    told = json.loads((root / "model.json").read_text())
    torch.set_num_threads(told["threads"])
    model, batches = loaded(root, told), np.load(root / "batches.npz")
    images = torch.tensor(batches["pixel_values"]).permute(0, 1, 4, 2, 3)
    labels = torch.tensor(batches["labels"]).long()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [{"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, *others], lr=told["learning_rate"], betas=(told["b1"], told["b2"]),
        eps=told["epsilon"], weight_decay=told["weight_decay"], fused=True,
    )  # fmt: skip
    form, at = torch.contiguous_format, 0

    def step():
        nonlocal at
        x = images[at % len(images)].contiguous(memory_format=form)
        loss = functional.cross_entropy(model(x), labels[at % len(images)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), told["clip"])
        optimizer.step()
        at += 1
        return loss

    @torch.inference_mode()
    def infer():
        nonlocal at
        at += 1
        return model(images[at % len(images)].contiguous(memory_format=form))

    for line in sys.stdin:
        what, value = line.split()
        if what == "layout":
            form = torch.channels_last if value == "last" else torch.contiguous_format
            model = model.to(memory_format=form)
            print(json.dumps({}), flush=True)
            continue
        model.train(what == "train")
        began = time.perf_counter()
        for _ in range(int(value)):
            last = step() if what == "train" else infer()
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "loss": float(last.detach().mean())}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
