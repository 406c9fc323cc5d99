"""Preprocessing against transformers' image processors: the largest difference for each.

Pictures of several sizes, smooth and noisy, go through the processors on Pillow and on torchvision
(`peer_preprocess.py`; the latter only where the peer's environment has it) and through
`fw.data.preprocess`, which reads the config that the peer wrote. Levels: of 0 … 255, before the
normalising; values: after it, which is done by `fw.models.pixels`.

The peer disagrees with itself in two cases, and here Pillow's side is taken: which pixel is nearest
(efficientnet-offset), and where a picture lies that is smaller than its crop (small-crop).

    .venv/bin/python scripts/bench/preprocess.py
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fw import report
from fw.data import preprocess
from fw.model import Model
from fw.models.pixels import normalised

BENCH = Path(__file__).parent
SIZES = ((480, 640), (97, 61), (224, 224), (301, 700), (30, 40))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", help="of another environment with transformers, for the peer")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "pictures").mkdir()
        pictures = {f"{h}x{w}-{kind}": picture(h, w, kind) for h, w in SIZES for kind in (0, 1)}
        for name, pixels in pictures.items():
            np.save(root / "pictures" / f"{name}.npy", pixels)
        program = [arguments.python] if arguments.python else [str(BENCH / "peer")]
        script = "peer_preprocess.py"
        if arguments.python:
            script = str(BENCH / script)
        subprocess.run([*program, script, str(root)], check=True, env=dict(os.environ))
        rows = [
            (case.parent.name, case.stem, *compare(case, pictures))
            for case in sorted(root.glob("*/*.npz"))
        ]
    print(report.table(rows, ("processor", "on", "levels", "mean levels", "values")))
    return 0


def picture(height: int, width: int, kind: int) -> np.ndarray:
    """Waves, and with `kind` noise besides: uint8 [height, width, 3]."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width] / 20
    waves = np.stack([np.sin(y + x * k) + np.cos(x - y / (k + 1)) for k in range(3)], -1)
    noise = kind * rng.normal(size=waves.shape)
    return (127 + 60 * (waves + noise)).clip(0, 255).astype(np.uint8)


def compare(case: Path, pictures: dict[str, np.ndarray]) -> tuple[str, str, str]:
    """The largest and the mean difference in levels, and the largest in values."""
    own, theirs = preprocess.load(case.parent), np.load(case)
    look = normalised(Model(None, lambda key: {}, look_at, {}), own.mean, own.std, own.scale)
    apply = jax.jit(lambda images: look.apply({}, {"images": images})[0])
    levels, means, values = [], [], []
    for name, pixels in pictures.items():
        images = own.inputs([pixels])["images"]
        ours, wanted = np.asarray(apply(images))[0], theirs[name]
        assert ours.shape == wanted.shape, (case, name, ours.shape, wanted.shape)
        back = (wanted * np.array(own.std) + own.mean) / own.scale
        apart = np.abs(images[0] - back.round())
        levels.append(apart.max())
        means.append(apart.mean())
        values.append(np.abs(ours - wanted).max())
    return f"{max(levels):.0f}", f"{np.mean(means):.1e}", f"{max(values):.1e}"


def look_at(variables: Any, batch: Any, **_: Any) -> tuple[Any, Any]:
    return batch["pixel_values"], variables


if __name__ == "__main__":
    raise SystemExit(main())
