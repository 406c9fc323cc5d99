"""Windows on images that are cut into parts, against one device; and what travels for them."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sharding import ShardingError, create, inspect, make_mesh, put, rules, scope
from sharding import shardings as where
from sharding.parallel.halo import windowed

RULES = rules()
IMAGES = ("batch", "height", "width", None)

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def conv(x, kernel, strides, padding):
    """A convolution of as many groups as the channels tell."""
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def close(got, expected, tolerance=1e-12):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


class Case:
    """A convolution drawn at random: sizes of 1 … 3 strides a part, kernels up to 7, any padding
    with which parts of output and input lie alike."""

    def __init__(self, seed, parts):
        rng = np.random.default_rng(seed)
        self.strides = tuple(int(s) for s in rng.integers(1, 3, 2))
        window = rng.choice([1, 2, 3, 5, 7], 2)
        self.window = tuple(map(int, window))
        self.padding = []
        for k, s in zip(self.window, self.strides, strict=True):
            total = int(rng.integers(max(k - s, 0), k))
            before = int(rng.integers(0, total + 1))
            self.padding.append((before, total - before))
        size = [n * s * int(rng.integers(1, 4)) for n, s in zip(parts, self.strides, strict=True)]
        # Channels in and out by name, as what they are in a kernel, and whether by groups.
        self.channels = [("embed", "mlp"), ("mlp", "embed"), ("mlp", "mlp"), None][seed % 4]
        groups = 8 if self.channels == ("mlp", "mlp") else 1
        self.names = (None, None, *(self.channels or (None, None)))
        if groups > 1:
            self.names = (None, None, None, "mlp")
        self.x = rng.normal(size=(4, *size, 8))
        self.kernel = rng.normal(size=(*self.window, 8 // groups, 8))
        out = [n // s for n, s in zip(size, self.strides, strict=True)]
        self.g = rng.normal(size=(4, *out, 8))

    def windowed(self, x, kernel):
        return windowed(
            lambda x, kernel, padding: conv(x, kernel, self.strides, padding),
            x,
            kernel,
            window=self.window,
            strides=self.strides,
            padding=self.padding,
            channels=self.channels,
            names=[self.names],
        )

    def whole(self, x, kernel):
        return conv(x, kernel, self.strides, self.padding)

    def outputs(self, f):
        def run(x, kernel):
            y, back = jax.vjp(f, x, kernel)
            return y, *back(self.g)

        return jax.jit(run)


MESHES = {
    "sequence=2": (RULES, (2, 1)),
    "sequence=4": (RULES, (4, 1)),
    "sequence=8": (RULES, (8, 1)),
    "sequence=4,tensor=2": (rules("fsdp", width="tensor"), (4, 2)),
    "data=2,sequence=2,tensor=2": (RULES, (2, 1)),
    "fsdp=2,sequence=2,tensor=2": (RULES, (2, 1)),
    "data=2,fsdp=2,tensor=2": (RULES, (1, 1)),
}


@pytest.mark.parametrize(
    ("mesh", "seed"),
    [
        pytest.param(mesh, seed, marks=() if seed // 2 == i % 2 else pytest.mark.slow)
        for i, mesh in enumerate(
            MESHES
        )  # two seeds of a mesh are fast, four kinds of channels of two
        for seed in range(40)
    ],
    ids=str,
)
def test_a_convolution_is_that_of_one_device_forward_and_backward(mesh, seed):
    layout, parts = MESHES[mesh]
    mesh = make_mesh(mesh)
    with jax.enable_x64(True):
        case = Case(seed, parts)
        expected = case.outputs(case.whole)(case.x, case.kernel)
        with scope(mesh, layout, differentiate=True):
            x = put(case.x, mesh, layout, IMAGES)
            close(case.outputs(case.windowed)(x, case.kernel), expected)


@pytest.mark.parametrize("mesh", ["sequence=4", "sequence=4,tensor=2"])
def test_maxima_over_windows_that_reach_beyond_the_image(mesh):
    layout, mesh = MESHES[mesh][0], make_mesh(mesh)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32) - 5

    def pool(x, padding):
        around = [(0, 0), *padding, (0, 0)]
        return lax.reduce_window(x, -np.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)

    with scope(mesh, layout):
        sides = {"window": (3, 3), "strides": (2, 2), "padding": [(1, 1), (1, 1)]}
        got = jax.jit(lambda x: windowed(pool, x, **sides, fill=-np.inf))(x)
    np.testing.assert_array_equal(got, pool(x, sides["padding"]))


def test_nothing_travels_but_halos_and_kernels():
    shape, window = (4, 32, 16, 8), (5, 3)
    rng = np.random.default_rng(0)
    axes = {"kernel": (None, None, "embed", "mlp")}
    start = {"kernel": rng.normal(size=(*window, 8, 6)).astype(np.float32)}

    def forward(params, x):
        return windowed(
            lambda x, k, padding: conv(x, k, (1, 1), padding), x, params["kernel"],
            window=window, padding=[(2, 2), (1, 1)], channels=("embed", "mlp"),
            names=[axes["kernel"]],
        )  # fmt: skip

    def gradients(params, x):
        return jax.grad(lambda params, x: jnp.sum(jnp.sin(forward(params, x))), (0, 1))(params, x)

    def sent(f, spec):
        """Bytes by kind and mesh axes."""
        mesh = make_mesh(spec)
        with scope(mesh, RULES, differentiate=True):
            params = create(lambda: start, shardings=where(axes, start, mesh, RULES))
            out = (jax.tree.map(lambda x: x.sharding, params), None) if f is gradients else None
            x = put(rng.normal(size=shape).astype(np.float32), mesh, RULES, IMAGES)
            compiled = jax.jit(f, out_shardings=out).lower(params, x).compile()
        found = Counter()
        for one in inspect(compiled).collectives:
            found[one.kind, one.along] += one.step_bytes
        return found

    row = 4 * 16 * 8 * 4  # of 4 images: 16 columns, 8 channels, float32
    halo, kernel = 2 * 2 * row, 5 * 3 * 8 * 6 * 4  # two rows to either side
    assert (halo, kernel) == (8192, 2880)
    permute, reduce = ("collective-permute", "sequence"), ("all-reduce", "sequence")
    gather, scatter = ("all-gather", "fsdp"), ("reduce-scatter", "fsdp")
    assert sent(forward, "sequence=4") == {permute: halo}
    assert sent(gradients, "sequence=4") == {permute: 2 * halo, reduce: 2 * 3 / 4 * kernel}
    assert sent(forward, "fsdp=2,sequence=4") == {permute: halo / 2, gather: kernel / 2}
    assert sent(gradients, "fsdp=2,sequence=4") == {
        permute: halo,
        gather: kernel / 2,
        scatter: kernel / 2,
        reduce: 2 * 3 / 4 * kernel / 2,
    }


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((2, 18, 8, 4), {"window": (3, 3), "padding": [(1, 1), (1, 1)]},
         "axis 'height' has size 18, which sequence=4 does not divide"),
        ((2, 12, 8, 4), {"window": (2, 2), "strides": (2, 2)},
         "height 12 is cut into 4 parts of 3, no multiple of the stride 2; choose .* of 8"),
        ((2, 16, 8, 4), {"window": (3, 3)},
         "height 16 becomes 14, .* with window 3 and stride 1 the padding 0 \\+ 0 must be 2 to 2"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(shape, options, said):
    def pool(x, padding):
        window, strides = (1, *options["window"], 1), (1, *options.get("strides", (1, 1)), 1)
        return lax.reduce_window(x, 0.0, lax.add, window, strides, [(0, 0), *padding, (0, 0)])

    with scope(make_mesh("sequence=4"), RULES), pytest.raises(ShardingError, match=said):
        windowed(pool, jnp.ones(shape), **options)
