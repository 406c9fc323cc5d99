"""`shard`: anybody's function on a mesh gives what it gives on one device."""

from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from sharding import ShardingError, gather, inspect, make_mesh, rules, shard

MESH = "data=2,fsdp=2,tensor=2"
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
NAMES: Any = {"up/kernel": ("embed", "mlp"), "down/kernel": ("mlp", "embed"), "**/bias": None}


def programs(sharded):
    """How many it has compiled."""
    compiled: Any = sharded._jitted
    return compiled._cache_size()


def mlp(params, x):
    up, down = params["up"], params["down"]
    return jnp.tanh(x @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"]


def init(key):
    up, down = jax.random.split(key)
    return {
        "up": {"kernel": jax.random.normal(up, (8, 32)) / 3, "bias": jnp.full(32, 0.5)},
        "down": {"kernel": jax.random.normal(down, (32, 8)) / 6, "bias": jnp.full(8, -0.5)},
    }


def bare():
    return mlp, init(jax.random.key(0)), NAMES


def from_linen(boxed):
    def dense(size, *names):
        start = linen.initializers.lecun_normal()
        return linen.Dense(size, kernel_init=linen.with_partitioning(start, names), use_bias=False)

    plain = [linen.Dense(32), linen.tanh, linen.Dense(8)]
    own = [dense(32, "embed", "mlp"), linen.tanh, dense(8, "mlp", "embed")]
    module = linen.Sequential(own if boxed else plain)
    names = {
        "**/layers_0/kernel": ("embed", "mlp"),
        "**/layers_2/kernel": ("mlp", "embed"),
        "**/bias": None,
    }
    return module.apply, module.init(jax.random.key(0), X), None if boxed else names


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 32, rngs=rngs, kernel_metadata={"axes": ("embed", "mlp")})
        self.down = nnx.Linear(32, 8, rngs=rngs, kernel_metadata={"axes": ("mlp", "embed")})

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def from_nnx():
    return lambda net, x: net(x), Net(nnx.Rngs(0)), {"*/bias": None}


def from_equinox():
    names = {
        "layers/0/weight": ("mlp", "embed"),
        "layers/1/weight": ("embed", "mlp"),
        "**/bias": None,
    }
    module = equinox.nn.MLP(8, 8, 32, depth=1, key=jax.random.key(0))
    return lambda module, x: jax.vmap(module)(x), module, names


FUNCTIONS = {
    "bare": bare,
    "linen": lambda: from_linen(False),
    "linen, boxed": lambda: from_linen(True),
    "nnx": from_nnx,
    "equinox": from_equinox,
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_gives_what_it_gives_on_one_device(kind):
    fn, params, names = FUNCTIONS[kind]()
    sharded = shard(fn, make_mesh(MESH), rules(), names)
    placed = sharded.place(params)
    cut = [x for x in jax.tree.leaves(placed) if isinstance(x, jax.Array) and x.ndim == 2]
    assert len(cut) == 2
    assert all(x.addressable_shards[0].data.size == x.size // 4 for x in cut)
    np.testing.assert_allclose(sharded(placed, X), fn(params, X), atol=1e-5)
    np.testing.assert_allclose(sharded(params, X), fn(params, X), atol=1e-5)  # placed on the way
    assert programs(sharded) == 1


def test_gradients_and_a_new_state_lie_as_the_parameters():
    def step(params, x, rate):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(mlp(p, x) ** 2))(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), loss

    sharded = shard(step, make_mesh(MESH), rules(), NAMES)
    params = sharded.create(init, jax.random.key(0))
    where = jax.tree.map(lambda x: x.sharding, params)
    expected, state = init(jax.random.key(0)), params
    for rate in (0.1, 0.2, 0.3):  # a number in an argument is a value: no new program
        state, loss = sharded(state, X, rate)
        expected, loss_alone = step(expected, X, rate)
        assert jax.tree.map(lambda x: x.sharding, state) == where
        np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gather(state), expected)
    assert programs(sharded) == 1
    report = inspect(sharded.lower(params, X, 0.1).compile())
    assert "params/up/kernel" in str(report)


def test_what_is_no_array_is_a_part_of_the_program():
    def scaled(params, x, *, loud, scale):
        return params["act"](x @ params["kernel"]) * (scale if loud else 1)

    sharded = shard(scaled, make_mesh("fsdp=2"), rules(), {"kernel": ("embed", "mlp")})
    params = {"kernel": jnp.eye(8), "act": jnp.tanh}
    np.testing.assert_allclose(sharded(params, X, loud=True, scale=3.0), 3 * np.tanh(X), rtol=1e-5)
    np.testing.assert_allclose(sharded(params, X, loud=False, scale=3.0), np.tanh(X), rtol=1e-5)
    assert programs(sharded) == 2


def test_it_refuses_what_names_and_put_refuse():
    mesh = make_mesh("data=2,fsdp=2")
    params = init(jax.random.key(0))
    with pytest.raises(ShardingError, match=r"down/bias .and 3 more.: it does not name its"):
        shard(mlp, mesh, rules()).place(params)
    with pytest.raises(ShardingError, match="pattern 'up/kernl' matches no array"):
        shard(mlp, mesh, rules(), {"up/kernl": ("embed", "mlp"), **NAMES})(params, X)
    with pytest.raises(ShardingError, match="batch: axis 'batch' has size 6"):
        shard(mlp, mesh, rules(), NAMES)(params, X[:6])
