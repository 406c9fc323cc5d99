"""Small data of every kind but text, that a model can learn in seconds."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ("bars", "dots")


def make_table(path: Path, rows: int = 160, seed: int = 0) -> Path:
    """A CSV of applicants: whether they pay back, and how much they earn."""
    rng = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "job", "debt", "pays", "income"])
        for _ in range(rows):
            age, debt = rng.uniform(20, 70), rng.uniform(0, 9)
            job = rng.choice(["clerk", "cook", "pilot"])
            score = (age - 45) / 10 - (debt - 4.5) + 2 * (job == "pilot")
            income = 100 * debt + age + rng.normal()
            row = [f"{age:.2f}", job, "" if rng.random() < 0.1 else f"{debt:.3f}"]
            writer.writerow([*row, "yes" if score > 0 else "no", f"{income:.2f}"])
    return path


def make_events(folder: Path, users: int = 40, items: int = 24, seed: int = 0) -> Path:
    """A folder of RecBole's atomic files: users like the films of their own half."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        for time, item in enumerate(rng.permutation(items)[:12]):
            rating = 5 if item % 2 == user % 2 else 1 + (rng.random() < 0.1) * 3
            lines.append(f"u{user}\ti{item}\t{rating}\t{time}")
    (folder / "tiny.inter").write_text("\n".join(lines))
    genres = [f"i{item}\t{'odd' if item % 2 else 'even'} film" for item in range(items)]
    (folder / "tiny.item").write_text("\n".join(["item_id:token\tgenre:token_seq", *genres]))
    return folder


def make_images(folder: Path, sizes: tuple[int, int, int] = (48, 12, 12), seed: int = 0) -> Path:
    """A folder per split and class of grey PNGs, 16 x 16: bars or dots."""
    rng = np.random.default_rng(seed)
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        for number in range(size):
            kind = SHAPES[number % 2]
            inner = folder / split / kind
            inner.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 60, (16, 16))
            shift = rng.integers(0, 2)
            pixels[:, shift::4] += 150
            if kind == "dots":
                pixels[shift::4] = rng.integers(0, 60, (4, 16))
                pixels[shift + 1 :: 4] = rng.integers(0, 60, pixels[shift + 1 :: 4].shape)
            Image.fromarray(pixels.astype(np.uint8)).save(inner / f"{number}.png")
    return folder


def make_maps(folder: Path, count: int = 24, side: int = 24, seed: int = 0) -> Path:
    """Folders `image` and `label`: a bright disc on a dark ground, and where it is."""
    rng = np.random.default_rng(seed)
    for name in ("image", "label"):
        (folder / name).mkdir(parents=True)
    y, x = np.mgrid[:side, :side]
    for number in range(count):
        (top, left), radius = rng.uniform(6, side - 6, 2), rng.uniform(4, 8)
        disc = (y - top) ** 2 + (x - left) ** 2 < radius**2
        pixels = rng.integers(0, 80, (side, side)) + 120 * disc
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "image" / f"{number}.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(folder / "label" / f"{number}.png")
    return folder
