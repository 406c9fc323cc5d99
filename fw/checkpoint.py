"""Checkpoints of a run: orbax, asynchronous; the last ones to go on from, the best to deliver.

A checkpoint holds the whole `TrainState`. With a batch a function of (seed, step), nothing else is
needed to go on bit for bit. Orbax writes beside and renames, so a killed process leaves either the
checkpoint or nothing.

It reads onto any mesh: arrays are stored in chunks far smaller than a device's part of them, and a
process reads those of its own devices, a bounded number at a time. So a move takes no more memory
than the state where it arrives, and writing takes a bounded amount beside the state. Only where the
layers of a stack were apart and shall be stacked, or the other way round, is it there twice for a
moment.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from fw.errors import FwError
from fw.models.stack_layout import layer_of, relayout
from fw.step import TrainState
from sharding import paths

_CHUNK = 8 * 2**20
"""Bytes stored as one piece, and so read as one. Orbax would store whole shards: those of one
device would be read, and decompressed, once for each of the eight devices that share them later."""

_IN_FLIGHT = 1
"""GB that are read or compressed for writing at a time; orbax's 96 would be twice the state. That
is 128 chunks: as many as orbax has files' reads under way."""

_RANK = "rank"
"""The figure that ranks checkpoints, where it is not the evaluation's."""

_ERRORS = "optimizer/exchange/errors/"
"""Where a state has what workers have not sent yet."""


class Checkpoints:
    """The checkpoints of one run folder; a context that waits for writes when it ends."""

    def __init__(
        self, folder: Path, *, metric: str, keep_last: int = 1, keep_best: int = 1, since: int = 0
    ):
        """Opens the folder.

        Args:
          folder: `RUN/checkpoints`.
          metric: the evaluation's figure that ranks them, the larger the better.
          keep_last, keep_best: how many of each stay on disk.
          since: the step before which none is better than a later one.
        """

        def rank(figures: Any) -> float:
            return figures.get(_RANK, figures[metric])

        self._since = since
        best = keep.BestN(get_metric_fn=rank, n=keep_best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(keep_last), best]),
            best_fn=rank,
            best_mode="max",
            cleanup_tmp_directories=True,  # what a killed process left half-written
        )
        self._folder, self._options = folder, options
        self._open(_IN_FLIGHT)

    def __enter__(self) -> "Checkpoints":
        """Nothing to do: it is open."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Waits for writes."""
        self._manager.close()

    def save(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Starts writing; returns once the arrays are copied from the devices.

        Args:
          state: at its step, under which it is kept.
          metrics: the evaluation's figures, the ranking one among them.
        """
        tree = state._asdict()
        self._admit(tree)
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
        self._manager.save(
            int(state.step),
            args=ocp.args.StandardSave(tree, chunks),
            metrics={**metrics, **self._early(int(state.step))},
            force=True,
        )

    def _early(self, step: int) -> dict[str, float]:
        """What ranks a step that is too early; the later of two such is the better one."""
        return {_RANK: step - 1e12} if step < self._since else {}

    def wait(self) -> None:
        """Returns when everything is written."""
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The steps that are on disk, in order."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The last step on disk."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step whose figure was the largest, the latest of equals; it is on disk."""
        return self._manager.best_step()

    def restore(self, like: TrainState, step: int | None) -> TrainState:
        """Reads the checkpoint of a step straight onto the devices.

        Args:
          like: a state with the shapes, dtypes and shardings wanted; arrays or their abstracts.
          step: which; None raises.

        Raises:
          FwError: there is none, it holds other arrays than the model has, or it is damaged.
        """
        if step is None:
            raise FwError(f"{self._folder}: no checkpoint yet; train first")
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict()
        )
        where = f"{self._folder}/{step}"
        try:
            there = self._manager.item_metadata(step).tree
            stored = _as_stored(abstract, there)
            _check_same(stored, there, where)
            self._admit(stored)
            tree = self._manager.restore(step, args=ocp.args.StandardRestore(stored))
        except FwError:
            raise
        except (ValueError, KeyError, AttributeError, OSError) as error:  # whatever orbax met with
            raise FwError(
                f"{where}: damaged: {str(error).partition(chr(10))[0][:300]}; remove this folder "
                "to go on from the checkpoint before it"
            ) from error
        return TrainState(**(tree if stored is abstract else _moved(tree, abstract)))

    def _open(self, in_flight: int) -> None:
        self._in_flight = in_flight
        handler = ocp.StandardCheckpointHandler(
            save_concurrent_gb=in_flight, restore_concurrent_gb=in_flight
        )
        self._manager = ocp.CheckpointManager(
            self._folder.resolve(), options=self._options, item_handlers=handler
        )

    def _admit(self, tree: Any) -> None:
        """Raises the limit to the largest array, which orbax would refuse."""
        needed = 1 + max(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) // 10**9
        if needed > self._in_flight:
            self._manager.close()
            self._open(needed)


def _as_stored(want: Any, there: Any) -> Any:
    """What to read: `want`, or the same with layers stacked, or apart, as they are stored."""
    abstract, found = _by_path(want), _by_path(there)
    if abstract.keys() == found.keys():
        apart = [p for p, x in abstract.items() if _of_others(p, x, found[p])]
        if not apart:
            return want
        for path in apart:
            x, count = abstract[path], found[path].shape[0]
            # Cut among workers as before, or each device reads all of what it will average.
            kept = x.sharding.spec[0] if count % x.shape[0] == 0 else None
            spec = (kept, *x.sharding.spec[1:])
            abstract[path] = _resized(x, (count, *x.shape[1:]), spec)
        return jax.tree.unflatten(jax.tree.structure(want), list(abstract.values()))
    if all(any(path.startswith(_ERRORS) for path in tree) for tree in (abstract, found)):
        raise FwError(
            "layers are stacked here and apart in the checkpoint, or the other way round, and what "
            "an exchange of gradients keeps cannot follow; resume where they lie as they did"
        )
    stored = {}
    for path in found:
        layer = layer_of(path)
        if path in abstract:
            stored[path] = abstract[path]
        elif layer and layer[1] in abstract:  # apart there, stacked here
            stacked = abstract[layer[1]]
            stored[path] = _resized(stacked, stacked.shape[1:], stacked.sharding.spec[1:])
        elif apart := [x for p, x in abstract.items() if (layer_of(p) or ("", ""))[1] == path]:
            shape = (len(apart), *apart[0].shape)
            stored[path] = _resized(apart[0], shape, (None, *apart[0].sharding.spec))
        else:
            return want
    return jax.tree.unflatten(jax.tree.structure(there), [stored[path] for path in found])


def _of_others(path: str, want: Any, there: Any) -> bool:
    """Whether it is what another number of workers has not sent yet (`fw.exchange`)."""
    errors = path.startswith(_ERRORS) and len(want.shape) == len(there.shape)
    return errors and want.shape != there.shape and want.shape[1:] == there.shape[1:]


def _resized(x: Any, shape: tuple[int, ...], spec: Iterable[Any]) -> jax.ShapeDtypeStruct:
    where = NamedSharding(x.sharding.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)


def _moved(tree: Any, want: Any) -> Any:
    """The arrays of a tree with their layers laid out as in another.

    What workers have not sent yet is shared evenly by the new ones, so that their mean is the same.
    """
    wanted = _by_path(want)
    lie = {path: x.sharding for path, x in wanted.items()}

    def moved(arrays: Any) -> Any:
        arrays = relayout(arrays, wanted, jnp.stack)
        return {
            path: jnp.broadcast_to(jnp.mean(x, 0), wanted[path].shape)
            if _of_others(path, wanted[path], x)
            else x
            for path, x in arrays.items()
        }

    arrays = jax.jit(moved, out_shardings=lie)(_by_path(tree))
    return jax.tree.unflatten(jax.tree.structure(want), [arrays[path] for path in wanted])


def _by_path(tree: Any) -> dict[str, Any]:
    return dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))


def _check_same(want: Any, found: Any, where: str) -> None:
    """Refuses arrays that differ before orbax begins to read them."""
    expected, there = (
        {path: (tuple(x.shape), str(x.dtype)) for path, x in _by_path(t).items()}
        for t in (want, found)
    )
    for path in sorted(expected.keys() | there.keys()):
        if expected.get(path) != there.get(path):
            raise FwError(
                f"{where}: {path}: expected {expected.get(path, 'nothing')}, found "
                f"{there.get(path, 'nothing')}; it is of another model or optimiser"
            )
