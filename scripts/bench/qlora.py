"""Whether QLoRA of an 8B decoder fits one TPU v5e of 16 GB, by the TPU's own compiler.

A Llama of 8 billion parameters (Llama-3-8B's sizes): kernels in nf4, tables in int8, low-rank
changes of all kernels of a layer, AdamW for these alone; one row of `--length` tokens a step, each
layer computed again on the way back. Compiled from shapes: no array is made and no TPU is needed.
So is what loading takes: the largest kernel in float32 and its codes, beside all others' codes.

    .venv/bin/python scripts/bench/qlora.py
"""

import argparse
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import steps
from jax.sharding import NamedSharding, PartitionSpec

import compress
from compress.scheme import Scheme
from fw import precision
from fw.adaptation import by_layer
from fw.models.llama import LlamaConfig, llama
from sharding import make_mesh, rules, scope

CHIP = 16 * 1024**3
"""Bytes of a v5e's memory."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--save", default="", help="write the program to this file")
    options = parser.parse_args()
    if steps.ENVIRONMENT.items() - os.environ.items():  # JAX reads it as it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | steps.ENVIRONMENT)
    model = llama(
        LlamaConfig(
            128_256, 4096, options.layers, 32, 14_336, num_key_value_heads=8, scan=True,
            remat="layer",
        )
    )  # fmt: skip
    adapt = compress.chain(
        compress.quantize(
            {"**/embedding": Scheme("int8", activations="float"), "**/kernel": "nf4"}
        ),
        compress.lora({"**/layers/**/kernel": options.rank}),
    )
    whole = jax.eval_shape(model.init, jax.random.key(0))["params"]
    params, _ = jax.eval_shape(adapt, whole)
    trainable, frozen = compress.partition(params)
    tx = optax.adamw(1e-4)
    moments = jax.eval_shape(tx.init, trainable)
    mesh, names = make_mesh("data=1", steps.devices("tpu")[:1]), rules()
    place = NamedSharding(mesh, PartitionSpec())

    def there(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    ids = jax.ShapeDtypeStruct((options.rows, options.length), jnp.int32)
    batch = dict.fromkeys(("input_ids", "segment_ids", "position_ids", "targets"), ids)

    def loss(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        variables = {"params": compress.combine(trainable, frozen), "state": {}}
        outputs, _ = compress.apply(model.apply)(variables, batch, train=True)
        return outputs["losses"].mean()

    def step(trainable: Any, moments: Any, frozen: Any, batch: Any) -> Any:
        value, slope = jax.value_and_grad(precision.apply(loss, "bf16"))(trainable, frozen, batch)
        updates, moments = tx.update(slope, moments, trainable)
        return optax.apply_updates(trainable, updates), moments, value

    began = time.perf_counter()
    with scope(mesh, names, differentiate=False), jax.numpy_dtype_promotion("standard"):
        traced = jax.jit(step, donate_argnums=(0, 1)).trace(
            *map(there, (trainable, moments, frozen, batch))
        )
    program = traced.lower(lowering_platforms=("tpu",)).compile()
    if options.save:
        with open(options.save, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(program.as_text() or "")
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(whole))
    own = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(trainable))
    print(f"{count / 1e9:.2f} billion parameters, {own / 1e6:.1f} million of them trained")
    print(f"compiled in {time.perf_counter() - began:.0f} s for {steps.devices('tpu')[0]}")
    training = taken(program, ("argument", "output", "temp", "alias"))
    large = max(jax.tree.leaves(whole["stack"]), key=lambda leaf: leaf.size)
    scheme = Scheme("nf4", role="kernel", activations="float")
    program = by_layer.trace(there(large), scheme).lower(lowering_platforms=("tpu",)).compile()
    print(f"loading, {list(large.shape)} in float32 coded last")
    # What it makes is a part of what is frozen.
    loading = taken(program, ("argument", "temp")) + nbytes(frozen)
    fits = max(training, loading) < CHIP
    print(f"training {gib(training)}, loading {gib(loading)} of {gib(CHIP)}: {FITS[fits]}")
    return 0 if fits else 1


FITS = {True: "fits", False: "too much"}


def taken(program: Any, parts: tuple[str, ...]) -> int:
    """Bytes of a program's memory; what is donated, an alias, is counted once."""
    memory = program.memory_analysis()
    found = {part: getattr(memory, f"{part}_size_in_bytes") for part in parts}
    for part, size in found.items():
        print(f"  {part:9} {gib(size)}")
    return sum(found.values()) - 2 * found.get("alias", 0)


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gib(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
