"""Pictures a second on one core: every augmentation, decoding and preprocessing, and torchvision's.

Each is timed alone on one thread, on pictures of 28 × 28 grey and 224 × 224 colours, and the best
of a few rounds is taken; decoding is of JPEGs of 500 × 375. With `--python`, an environment that
has torchvision, its transforms of the same name are timed there, one picture after the other, as
its data loader calls them.

    .venv/bin/python scripts/bench/augment.py --python VENV/bin/python
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from io import BytesIO

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
from PIL import Image

from fw import report
from fw.data import crops, pictures
from fw.data.augment import Augment
from fw.data.preprocess import Preprocessor
from fw.data.rows import Rows

OPTIONS = (
    "flip", "crop=4", "resized=0.25", "jitter=0.4/0.4/0.4/0.1", "randaugment=2/9", "mixup=0.2",
    "cutmix=1", "crop=4,flip", "resized=0.25,flip,randaugment=2/9,mixup=0.2", "elastic=2/3",
)  # fmt: skip
SIZES = {"28×28×1": (28, 28, 1, 256), "224×224×3": (224, 224, 3, 16)}
SECONDS = 0.3

PEER = """
import json, sys, time
import numpy as np, torch
from PIL import Image
from torchvision import transforms as T
torch.set_num_threads(1)
def rate(work, items):
    best, until = 0, time.perf_counter() + 3 * {seconds}
    while time.perf_counter() < until:
        began = time.perf_counter()
        for item in items: work(item)
        best = max(best, len(items) / (time.perf_counter() - began))
    return best
found = {{}}
for name, (h, w, c, n) in {sizes}.items():
    a = np.random.default_rng(0).integers(0, 256, (n, h, w, c), np.uint8)
    images = [Image.fromarray(x.squeeze()) for x in a]
    found[name] = {{option: rate(work, images) for option, work in {{
        "flip": T.RandomHorizontalFlip(), "crop=4": T.RandomCrop((h, w), 4),
        "resized=0.25": T.RandomResizedCrop((h, w), (0.25, 1)),
        "jitter=0.4/0.4/0.4/0.1": T.ColorJitter(.4, .4, .4, .1),
        "randaugment=2/9": T.RandAugment(2, 9),
        "crop=4,flip": T.Compose([T.RandomCrop((h, w), 4), T.RandomHorizontalFlip()]),
        "elastic=2/3": T.ElasticTransform(50.0, 3.0),
    }}.items()}}
print(json.dumps(found))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", help="of an environment with torchvision")
    arguments = parser.parse_args()
    pictures.THREADS = crops.THREADS = 1
    ours = {size: {option: augmented(option, *shape) for option in OPTIONS}
            for size, shape in SIZES.items()}  # fmt: skip
    theirs = {size: {} for size in SIZES}
    if arguments.python:
        program = PEER.format(sizes=SIZES, seconds=SECONDS)
        out = subprocess.run([arguments.python, "-c", program], check=True, stdout=subprocess.PIPE)
        theirs = json.loads(out.stdout)
    rows = [
        (option, *(figure for size in SIZES for figure in
                   (f"{ours[size][option]:,.0f}", f"{theirs[size].get(option, 0):,.0f}")))
        for option in OPTIONS
    ]  # fmt: skip
    print(report.table(rows, ("images/s", *(f"{s} {w}" for s in SIZES for w in ("fw", "torch")))))
    print(report.table(list(decoded().items()), ("500×375 JPEG", "images/s")))
    return 0


def augmented(option: str, high: int, wide: int, channels: int, count: int) -> float:
    images = np.random.default_rng(0).integers(0, 256, (count, high, wide, channels), np.uint8)
    rows = Rows({"images": images, "labels": np.zeros(count, np.int32)}, {})
    change, places = Augment.parse(option).change(rows, 0), np.arange(count)
    return rate(lambda: change(rows.arrays, places), count)


def decoded() -> dict[str, str]:
    y, x = np.mgrid[:375, :500]
    pixels = np.stack([127 + 100 * np.sin(y / k + x / 17) for k in (9, 23, 31)], -1)
    noise = np.random.default_rng(0).normal(scale=8, size=pixels.shape)
    file = BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    made, data = Preprocessor(size=256, crop=(224, 224), resample=3), file.getvalue()
    return {
        "decode": f"{rate(lambda: pictures.decode(data), 1):,.0f}",
        "decode, resize, crop": f"{rate(lambda: made.pixels(data), 1):,.0f}",
    }


def rate(work: Callable[[], object], count: int) -> float:
    """Pictures a second in the best call."""
    work()
    best, until = 0.0, time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        work()
        best = max(best, count / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    raise SystemExit(main())
