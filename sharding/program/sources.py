"""Which line of the user's program an instruction comes from."""

from pathlib import Path

from sharding.program.hlo import Frame

_OWN = tuple(Path(__file__).parents[1] / name for name in ("sharding", "compress", "fw"))


def inside(frames: list[Frame], op_name: str) -> list[Frame]:
    """The lines inside the traced function, which `jit(step)/…` names; all if none is.

    The lines outside it only called it.
    """
    traced = op_name.partition("jit(")[2].partition(")")[0]
    ends = [n for n, f in enumerate(frames, 1) if f.function.rpartition(".")[2] == traced]
    return frames[: ends[-1]] if ends else frames


def source(frames: list[Frame], traced: bool) -> Frame | None:
    """The line to look at: the user's innermost, then that of a model of this library, then any."""
    mine = [frame for frame in frames if traced and not _installed(frame.file, _OWN)]
    ours = [frame for frame in frames if not _installed(frame.file, _OWN[:1])]
    return next(iter(mine or ours or frames), None)


def _installed(file: str, own: tuple[Path, ...]) -> bool:
    path = Path(file)
    third = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(third) or any(path.is_relative_to(folder) for folder in own)
