"""A student learns what its teacher says: the loss by hand, and training with it, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from fw.distillation import Distil, distilled, divergence
from fw.errors import FwError
from fw.labels import IGNORE
from fw.models.bert import BertConfig, bert
from fw.step import initial_state, make_step
from fw.tasks import cross_entropy
from sharding import make_mesh, put, rules, shardings

pytestmark = pytest.mark.usefixtures("quickly_compiled")

STUDENT, TEACHER = (
    bert(
        BertConfig(
            16, 8 * n, n, 2, 16, 3, "token_classification", hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.0, initializer_range=0.5,
        )
    )
    for n in (1, 2)
)  # fmt: skip


def batch(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 16, (8, 6)).astype(np.int32)
    wanted = rng.integers(0, 3, ids.shape).astype(np.int32)
    wanted[:, -2:] = IGNORE
    places = np.broadcast_to(np.arange(6, dtype=np.int32), ids.shape).copy()
    return {"input_ids": ids, "segment_ids": np.ones_like(ids), "position_ids": places,
            "labels": wanted}  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_the_formula_over_labels_that_count(temperature):
    rng = np.random.default_rng(1)
    said, taught = rng.standard_normal((2, 4, 5, 7)).astype(np.float32) * 3
    labels = np.where(rng.random((4, 5)) < 0.5, IGNORE, 0).astype(np.int32)
    p, q = (log_softmax(x.astype(np.float64) / temperature, -1) for x in (taught, said))
    want = temperature**2 * (np.exp(p) * (p - q)).sum(-1)[labels != IGNORE].sum()
    total, count = divergence(jnp.array(said), jnp.array(taught), {"labels": labels}, temperature)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert int(count) == (labels != IGNORE).sum()


def train(mesh, options, steps):
    mesh, own = make_mesh(mesh), rules()
    taught, loss = distilled(STUDENT, TEACHER, cross_entropy, options)
    tx = optax.adam(3e-2)
    variables = STUDENT.init(jax.random.key(0))
    state = initial_state(
        jax.device_put(variables, shardings(STUDENT.axes, variables, mesh, own)), tx, mesh
    )
    teacher = TEACHER.init(jax.random.key(1))
    teacher = jax.device_put(teacher, shardings(TEACHER.axes, teacher, mesh, own))
    before = jax.tree.map(np.asarray, teacher)
    step = make_step(taught, loss, tx, mesh=mesh, rules=own)
    losses = []
    for i in range(steps):
        state, metrics = step(state, put(batch(i % 4), mesh, own), teacher)
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, teacher))
    return losses, state.variables, teacher


def test_a_student_comes_to_say_what_its_teacher_says():
    """With no weight on the labels, which are chance."""
    losses, variables, teacher = train("data=1", Distil(teacher_weight=1.0), 200)
    assert losses[-1] < 0.15 * losses[0]
    said, _ = STUDENT.apply(variables, batch(0))
    taught, _ = TEACHER.apply(teacher, batch(0))
    assert (said.argmax(-1) == taught.argmax(-1)).mean() > 0.9


def test_eight_devices_learn_as_one():
    one, *_ = train("data=1", Distil(), 5)
    eight, *_ = train("data=2,fsdp=2,tensor=2", Distil(), 5)
    np.testing.assert_allclose(eight, one, rtol=1e-4)


def test_without_weight_the_loss_is_that_of_labels():
    taught, loss = distilled(STUDENT, TEACHER, cross_entropy, Distil(teacher_weight=0.0))
    variables = STUDENT.init(jax.random.key(0)) | {"frozen": TEACHER.init(jax.random.key(1))}
    outputs, _ = taught.apply(variables, batch(0))
    got, want = loss(outputs, batch(0)), cross_entropy(outputs[0], batch(0))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_what_does_not_fit_is_told():
    other = bert(BertConfig(16, 8, 1, 2, 16, 4, "token_classification"))
    taught, loss = distilled(STUDENT, other, cross_entropy)
    variables = STUDENT.init(jax.random.key(0)) | {"frozen": other.init(jax.random.key(1))}
    with pytest.raises(FwError, match=r"logits are \[8, 6, 3\], the teacher's \[8, 6, 4\]"):
        loss(taught.apply(variables, batch(0))[0], batch(0))
    for options, said in ({"temperature": 0.0}, "more than 0"), ({"teacher_weight": 2.0}, "0 to 1"):
        with pytest.raises(FwError, match=said):
            Distil(**options)
