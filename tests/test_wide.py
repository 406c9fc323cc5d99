"""A model with every axis there is, stages and experts among them: the same training anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fw.labels import IGNORE
from fw.model import from_nnx
from fw.models.experts import Experts, ExpertsConfig
from fw.models.layers import (
    Dense,
    Embedding,
    LayerNorm,
    attention,
    denses,
    dropout,
    embeddings,
    visible,
)
from fw.models.stack import Stack
from fw.optimizer import AdamW, optimizer
from fw.step import initial_state, make_step
from fw.tasks import cross_entropy
from sharding import (
    constrain,
    contract,
    create,
    gather,
    inspect,
    make_mesh,
    put,
    rules,
    shardings,
)
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("quickly_compiled")

# Every axis, and the pairs that people use, on 2, 4 and 8 devices. test_step.py has those of BERT.
MESHES = (
    "pipe=2",
    "expert=4",
    "pipe=4,data=2",
    "data=2,expert=2,tensor=2",
    "pipe=2,expert=2,fsdp=2",
    "expert=2,sequence=2,fsdp=2",
    "pipe=2,sequence=2,tensor=2",
)
SIZE, HEADS, LAYERS, ROWS, LENGTH, WORDS, STEPS = 16, 2, 4, 16, 16, 48, 50
RULES = rules()


class Layer(nnx.Module):
    """Attention and experts, each normalised before (pre-norm)."""

    def __init__(self, rngs):
        split = {"std": 0.2, "rngs": rngs}
        self.norms = nnx.List([LayerNorm(SIZE, epsilon=1e-6) for _ in range(2)])
        self.inputs = nnx.List([Dense(SIZE, SIZE, ("embed", "heads"), **split) for _ in range(3)])
        self.out = Dense(SIZE, SIZE, ("heads", "embed"), **split)
        config = ExpertsConfig(number=4, chosen=2, size=SIZE, inner_size=16, capacity=1.5, std=0.2)
        self.experts = Experts(config, rngs)

    def __call__(self, x, segments, key=None):
        keys = (None, None) if key is None else jax.random.split(key)
        parts = (*x.shape[:2], HEADS, SIZE // HEADS)
        qkv = denses(self.norms[0](x), list(self.inputs))
        q, k, v = (constrain(y.reshape(parts), "batch", "length", "heads", None) for y in qkv)
        attended = attention(q, k, v, visible(segments, x.dtype), rate=0.1, key=keys[0])
        x = x + self.out(attended.reshape(x.shape))
        y, aux = self.experts(self.norms[1](x), segments > 0)
        x = constrain(x + dropout(y, 0.1, keys[1]), "batch", "length", "embed")
        return x, aux.balance


class Wide(nnx.Module):
    def __init__(self, rngs):
        self.word = Embedding(WORDS, SIZE, ("vocab", "embed"), std=0.5, rngs=rngs)
        self.stack = Stack(Layer, LAYERS, microbatches=4, has_aux=True, rngs=rngs)
        self.head = Dense(SIZE, 3, ("embed", "labels"), std=0.2, rngs=rngs)

    def __call__(self, batch, key):
        x = constrain(embeddings([self.word], [batch["input_ids"]]), "batch", "length", "embed")
        x, balance = self.stack(x, batch["segment_ids"], key=key)
        return self.head(x), balance


MODEL = from_nnx(None, Wide, lambda module, batch, key, _: module(batch, key))


def loss(outputs, batch):
    logits, balance = outputs
    value, weight = cross_entropy(logits, batch)
    return value + balance * weight * jnp.asarray(0.01, value.dtype), weight


def text_batch(step):
    """Two texts a row and padding; the label is a function of the token, so there is a rule."""
    rng = np.random.default_rng((11, step))
    ids = rng.integers(0, WORDS, (ROWS, LENGTH))
    cut, end = rng.integers(4, 9, (ROWS, 1)), rng.integers(10, LENGTH + 1, (ROWS, 1))
    place = np.arange(LENGTH)[None]
    segments = np.where(place < cut, 1, np.where(place < end, 2, 0))
    labels = np.where(segments > 0, ids % 3, IGNORE)
    batch = {"input_ids": ids, "segment_ids": segments, "labels": labels}
    return {name: value.astype(np.int32) for name, value in batch.items()}


def begin(spec, steps, start):
    """The step, its first state, and a function that places the batch of a step."""
    mesh, tx = make_mesh(spec), optimizer(AdamW(learning_rate=3e-3), steps)
    where = shardings(MODEL.axes, start, mesh, RULES)
    variables = create(lambda: start, shardings=where)
    step = make_step(MODEL, loss, tx, mesh=mesh, rules=RULES)
    return step, initial_state(variables, tx, mesh), lambda i: put(text_batch(i), mesh, RULES)


def train(spec, start):
    """The losses and gradient norms of all steps."""
    step, state, batch = begin(spec, STEPS, start)
    losses, norms = [], []
    for index in range(STEPS):
        state, metrics = step(state, batch(index))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return np.array(losses), np.array(norms)


@pytest.mark.slow
@pytest.mark.parametrize(("x64", "meshes"), [(0, MESHES), (1, MESHES)])
def test_fifty_steps_are_the_same_on_every_mesh(x64, meshes):
    with jax.enable_x64(bool(x64)):
        start = jax.tree.map(np.asarray, MODEL.init(jax.random.key(0)))
        losses, norms = train("data=1", start)
        assert losses[-5:].mean() < 0.9 * losses[:5].mean()
        rtol = 1e-9 if x64 else 1e-4
        for spec in meshes:
            found, found_norms = train(spec, start)
            np.testing.assert_allclose(found, losses, rtol=rtol, err_msg=spec)
            np.testing.assert_allclose(found_norms, norms, rtol=rtol, err_msg=spec)
            print(f"{spec}: {np.abs(found / losses - 1).max():.1e} relative")


def test_initial_parameters_are_those_of_one_device():
    key = jax.random.key(3)
    alone = jax.jit(MODEL.init)(key)
    for spec in ("data=8", "pipe=2,expert=2,fsdp=2", "sequence=2,tensor=4"):
        where = shardings(MODEL.axes, jax.eval_shape(MODEL.init, key), make_mesh(spec), RULES)
        born = gather(create(MODEL.init, key, shardings=where))
        # The bits of random numbers are equal; their way through erf⁻¹ is compiled by shape.
        jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, b, 4), born, gather(alone))


@pytest.mark.parametrize("spec", [slow("expert=2,sequence=2,fsdp=2"), "pipe=2,expert=2,fsdp=2"])
def test_the_compiled_step_keeps_its_contract(spec):
    """Every collective where its axis should have one: tokens and kernels travel, nothing else."""
    start = MODEL.init(jax.random.key(0))
    allowed = {
        "expert": ["all-to-all", "all-reduce"],
        # A row is a group of tokens, so its choices, not the tokens, are gathered.
        "sequence": ["collective-permute", "all-reduce", "all-gather"],
        "fsdp": ["all-gather", "reduce-scatter", "all-reduce", "all-to-all"],
        # After the stack, rows are gathered for what follows: that lies on every stage.
        "pipe": ["collective-permute", "all-reduce", "all-gather"],
    }
    step, state, batch = begin(spec, 1, start)
    compiled = step.lower(state, batch(0)).compile()
    contract(compiled, allowed=allowed)
    gathered = sum(
        found.wire_bytes * found.count
        for found in inspect(compiled).collectives
        if found.kind == "all-gather" and "pipe" in found.axes
    )
    assert gathered <= ROWS // 4 * LENGTH * SIZE * 4  # a device's rows: no weights
