"""The peer's side of preprocess.py: image processors of transformers, and what comes out of them.

scripts/bench/peer peer_preprocess.py FOLDER

FOLDER/pictures/NAME.npy are uint8 [H, W, C]; FOLDER/CASE/preprocessor_config.json is written, and
FOLDER/CASE/pil.npz, and torchvision.npz where that is installed: float32 [H, W, C] by name.
"""

# pyright: reportMissingImports=false
# (torch and transformers live in the peer's environment only)

import sys
from pathlib import Path

import numpy as np
import transformers
from PIL import Image

CASES = {
    "vit": ("ViT", {}),
    "vit-lanczos": ("ViT", {"resample": 1, "size": {"height": 96, "width": 64}}),
    "deit": ("DeiT", {}),
    "dinov2": (
        "Bit",
        {"size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406],
         "image_std": [0.229, 0.224, 0.225]},
    ),
    "clip-sized": ("Bit", {}),
    "small-crop": ("Bit", {"size": {"shortest_edge": 40}, "crop_size": 65}),
    "resnet": ("ConvNext", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}),
    "convnext": ("ConvNext", {}),
    "efficientnet": ("EfficientNet", {}),
    "efficientnet-offset": (
        "EfficientNet", {"rescale_offset": True, "do_center_crop": True, "resample": 0}
    ),
    "unscaled": ("ViT", {"do_rescale": False, "do_normalize": False, "size": 50}),
}  # fmt: skip


def main() -> None:
    root = Path(sys.argv[1])
    pictures = {path.stem: np.load(path) for path in sorted((root / "pictures").glob("*.npy"))}
    try:
        import torchvision  # noqa: F401

        backends = {"pil": "Pil", "torchvision": ""}
    except Exception:  # not installed, or for another torch
        backends = {"pil": "Pil"}
    for case, (family, options) in CASES.items():
        for backend, suffix in backends.items():
            processor = getattr(transformers, f"{family}ImageProcessor{suffix}")(**options)
            made = {}
            for name, pixels in pictures.items():
                given = Image.fromarray(pixels)
                out = processor(given, return_tensors="np" if suffix else "pt")["pixel_values"][0]
                made[name] = np.moveaxis(np.asarray(out, np.float32), 0, -1)
            processor.save_pretrained(root / case)
            np.savez(root / case / f"{backend}.npz", **made)


if __name__ == "__main__":
    main()
