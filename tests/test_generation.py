"""Generation: cached as uncached, whatever the batch and the mesh; sampling against a plain one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress
from fw.errors import FwError
from fw.generation import Decoder, Sampling, choose, controls, decode, speculate
from fw.generation.decode import prepare
from fw.models.bert import BertConfig, bert
from fw.models.llama import LlamaConfig, llama
from sharding import create, make_mesh, rules, shardings
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("quickly_compiled")


VOCAB = 61
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 8},
}
ALIKE = ("mistral", "qwen2", "qwen3")
"""Those that differ from the others in little; `--all` runs them."""
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6]]
MOST = 9


def make(kind, seed=0, **more):
    config = LlamaConfig(
        VOCAB, 16, 3, 4, 24, model_type=kind, max_position_embeddings=64, **KINDS[kind] | more
    )
    model, random = llama(config), np.random.default_rng(seed)
    variables = jax.tree.map(
        lambda x: np.asarray(x + random.normal(0, 0.3, x.shape), np.float32),
        model.init(jax.random.key(0)),
    )
    return model, variables


def uncached(model, variables, prompt, setting, most, stops=()):
    """The whole text again for every token, alone, with the logits of the plain forward pass."""
    ids = list(prompt)
    for _ in range(most):
        x = np.zeros((1, 32), np.int32)
        x[0, : len(ids)] = ids
        segments = (np.arange(32) < len(ids)).astype(np.int32)[None]
        batch = {"input_ids": x, "segment_ids": segments, "position_ids": np.arange(32)[None]}
        logits = np.asarray(_apply(model)(variables, batch))[0, len(ids) - 1]
        ids.append(plain_choice(logits, ids, setting))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


_JITTED: dict[Any, Any] = {}


def _apply(model):
    if model not in _JITTED:
        _JITTED[model] = jax.jit(lambda v, b: model.apply(v, b)[0])
    return _JITTED[model]


def allowed(logits, seen, s):
    """The logits that the settings leave, one filter after another, in numpy."""
    logits = logits.astype(np.float64)
    for token in set(seen):
        logits[token] *= (1 / s.repetition_penalty) if logits[token] > 0 else s.repetition_penalty
    if s.temperature == 0:
        return logits
    logits /= s.temperature
    if s.top_k:
        logits[logits < np.sort(logits)[-s.top_k]] = -np.inf

    def shares():
        e = np.exp(logits - logits.max())
        return e / e.sum()

    order = np.argsort(-logits)
    falling = shares()[order]
    logits[order[np.cumsum(falling) - falling >= s.top_p]] = -np.inf
    logits[shares() < s.min_p * shares().max()] = -np.inf
    return logits


def plain_choice(logits, ids, s):
    left = allowed(logits, ids if s.repetition_penalty != 1 else (), s)
    if s.temperature == 0:
        return int(np.argmax(left))
    key = jax.random.fold_in(jax.random.key(np.uint32(s.seed)), np.int32(len(ids)))
    return int(np.asarray(jax.random.categorical(key, left.astype(np.float32))))


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.9, top_k=20, seed=7),
    Sampling(temperature=1.3, top_p=0.8, min_p=0.05, repetition_penalty=1.4, seed=8),
]


def run(decoder, prompts=PROMPTS, settings=SETTINGS, how=decode, most=MOST, stops=(), **more):
    rows: list[list[int]] = [[] for _ in prompts]
    for step in how(decoder, prompts, settings, most=most, stops=stops, **more):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] if k in ALIKE else []) for k in KINDS],
)
def test_cached_as_uncached_token_for_token_in_a_batch_of_lengths(kind):
    model, variables = make(kind)
    expected = [
        uncached(model, variables, p, s, MOST) for p, s in zip(PROMPTS, SETTINGS, strict=True)
    ]
    decoder = Decoder(model, variables)
    assert run(decoder) == expected
    assert run(decoder.apart()) == expected
    assert [run(decoder, [p], [s])[0] for p, s in zip(PROMPTS, SETTINGS, strict=True)] == expected


@pytest.mark.parametrize(
    "spec", [slow("data=2"), slow("fsdp=2,tensor=2"), "data=2,fsdp=2,tensor=2"]
)
def test_every_mesh_generates_the_same(spec):
    model, variables = make("llama")
    mesh, layout = make_mesh(spec), rules()
    where = shardings(model.axes, variables, mesh, layout)
    placed = create(lambda: variables, shardings=where)
    decoder = Decoder(model, placed, mesh, layout)
    assert run(decoder) == run(Decoder(model, variables))
    batch = decoder.placed(np.zeros((8, 4), np.int32))
    with decoder.scope():
        cache = jax.jit(lambda ids: model.cache(len(ids), 64))(batch)  # type: ignore[misc]
    size = cache.key.addressable_shards[0].data.nbytes
    assert size * mesh.size == cache.key.nbytes  # cut like the model, on every device


def test_a_text_ends_at_its_stop_and_the_others_go_on():
    model, variables = make("llama")
    whole = run(Decoder(model, variables))
    stop = whole[1][3]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert run(Decoder(model, variables), stops=[stop]) == cut
    assert any(len(a) < len(b) for a, b in zip(cut, whole, strict=True))


@pytest.mark.parametrize("quality", [slow("itself"), "near", slow("stranger")])
def test_speculation_changes_no_token(quality):
    model, variables = make("llama")
    draft_model, draft = make("mistral", seed=3)
    if quality != "stranger":
        draft_model, random = model, np.random.default_rng(1)
        noise = 0.0 if quality == "itself" else 0.02
        draft = jax.tree.map(lambda x: np.float32(x + random.normal(0, noise, x.shape)), variables)
    decoder, guesser = Decoder(model, variables), Decoder(draft_model, draft)
    stop = run(decoder)[0][5]
    for stops in ((), (stop,)):
        expected = run(decoder, stops=stops)
        found = run(decoder, how=lambda *a, **k: speculate(a[0], guesser, *a[1:], **k), stops=stops)
        assert found == expected, stops
    alone = lambda *a, **k: speculate(a[0], guesser, *a[1:], **k)  # noqa: E731
    assert run(decoder, PROMPTS[:1], SETTINGS[:1], how=alone) == [run(decoder)[0]]


def test_int8_weights_generate_what_their_uncached_forward_says():
    model, variables = make("llama")
    small = {**variables, "params": compress.quantize("int8")(variables["params"])[0]}
    apply = jax.jit(lambda v, b: compress.apply(model.apply)(v, b)[0])
    ids = list(PROMPTS[0])
    for _ in range(MOST):
        one = np.ones((1, len(ids)), np.int32)
        batch = {"input_ids": np.array([ids], np.int32), "segment_ids": one,
                 "position_ids": np.arange(len(ids), dtype=np.int32)[None]}  # fmt: skip
        ids.append(int(np.argmax(apply(small, batch)[0, -1])))
    found = run(Decoder(model, small), PROMPTS[:1], SETTINGS[:1])
    assert found == [ids[len(PROMPTS[0]) :]]
    assert run(Decoder(model, small).apart(), PROMPTS[:1], SETTINGS[:1]) == found


def teacher_forced(decoder, prompts, follows):
    """Logits of the tokens that follow each prompt, told one by one, and the cache after them."""
    given = prepare(decoder, prompts, [Sampling()] * len(prompts), len(follows[0]), ())
    programs, slots = decoder.programs, given.options["slots"]
    read = jax.jit(
        lambda v, ids, where, cache: programs.extend(
            v, ids, where, cache or programs.begin(len(ids), slots), 1
        )
    )
    logits, cache = decoder.run(read, given.ids, given.positions, None)
    told = [logits]
    for i, column in enumerate(np.array(follows, np.int32).T):
        where = np.array([[len(p) + i] for p in prompts], np.int32)
        logits, cache = decoder.run(read, column[:, None], where, cache)
        told.append(logits)
    return np.concatenate(told, 1), cache


@pytest.mark.parametrize("weights", ["f32", slow("int8")])
def test_an_int8_cache_is_a_quarter_and_moves_logits_little(weights):
    model, variables = make("qwen3")
    if weights == "int8":
        variables = {**variables, "params": compress.quantize("int8")(variables["params"])[0]}
    follows = np.random.default_rng(2).integers(0, VOCAB, (len(PROMPTS), 12))
    decoder = Decoder(model, variables)
    small = dataclasses.replace(decoder, cache="int8")
    exact, plain = teacher_forced(decoder, PROMPTS, follows)
    found, cache = teacher_forced(small, PROMPTS, follows)
    # A number of a row is off by half a step in 127 at most, which these weights enlarge, and their
    # own rounding enlarges further.
    assert 0 < np.std(found - exact) < {"f32": 0.02, "int8": 0.05}[weights] * np.std(exact)
    if weights == "f32":
        apart, _ = teacher_forced(small.apart(), PROMPTS, follows)
        np.testing.assert_allclose(apart, found, atol=1e-3 * np.std(exact))
    size = model.config.size
    for kept, whole in ((cache.key, plain.key), (cache.value, plain.value)):
        parts = sum(x.nbytes for x in jax.tree.leaves(kept))
        assert kept.values.dtype == jnp.int8 and parts == whole.nbytes * (1 + 4 / size) / 4
        rows = np.asarray(whole)
        scale = np.abs(rows).max(-1, keepdims=True) / np.float32(127)
        assert kept.scale.shape == scale.shape
        # The first layer's come from the same words; every other's from what the last rounded.
        off = np.abs(np.asarray(kept.dense()) - rows)[0]
        assert np.all(off <= scale[0] * 0.5001 + 1e-6)


def test_an_int8_cache_generates_in_batches_to_stops_and_ahead():
    model, variables = make("llama")
    greedy = [Sampling()] * len(PROMPTS)
    decoder = Decoder(model, variables, cache="int8")
    whole, exact = (run(d, settings=greedy) for d in (decoder, Decoder(model, variables)))
    assert sum(a == b for a, b in zip(whole, exact, strict=True)) >= 2  # of three texts
    stop = whole[1][3]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert run(decoder, settings=greedy, stops=[stop]) == cut
    random = np.random.default_rng(1)
    near = jax.tree.map(lambda x: np.float32(x + random.normal(0, 0.02, x.shape)), variables)
    guesser = dataclasses.replace(decoder, variables=near)
    ahead = lambda *a, **k: speculate(a[0], guesser, *a[1:], **k)  # noqa: E731
    assert run(decoder, settings=greedy, how=ahead) == whole


@pytest.mark.parametrize("spec", [slow("fsdp=2,tensor=2"), "data=2,fsdp=2,tensor=2"])
def test_an_int8_cache_is_cut_as_the_model_is(spec):
    model, variables = make("llama")
    mesh, layout = make_mesh(spec), rules()
    placed = create(lambda: variables, shardings=shardings(model.axes, variables, mesh, layout))
    decoder = Decoder(model, placed, mesh, layout, cache="int8")
    assert run(decoder) == run(Decoder(model, variables, cache="int8"))
    given = prepare(decoder, PROMPTS, SETTINGS, MOST, ())
    first = decoder.programs.first
    state, _ = decoder.run(first, given.ids, given.positions, *given.shared, **given.options)
    for part in jax.tree.leaves((state["cache"].key, state["cache"].value)):
        assert part.addressable_shards[0].data.nbytes * mesh.size == part.nbytes


def test_sampling_draws_by_the_allowed_probabilities():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, 24).astype(np.float32)
    seen = np.zeros(24, bool)
    seen[[3, 4, 5]] = True
    for s in (
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.2, top_p=0.7),
        Sampling(temperature=1.5, min_p=0.2),
        Sampling(temperature=1.4, top_k=12, top_p=0.9, min_p=0.03, repetition_penalty=1.7),
    ):
        left = allowed(logits, np.flatnonzero(seen), s)
        expected = np.exp(left - left.max())
        expected /= expected.sum()
        draws = 4000
        many = controls([dataclasses.replace(s, seed=i) for i in range(draws)])
        rows = jnp.broadcast_to(logits, (draws, 24))
        tokens = choose(rows, jnp.full(draws, 9), many, jnp.broadcast_to(seen, (draws, 24)))
        counts = np.bincount(np.asarray(tokens), minlength=24)
        assert not counts[expected == 0].any(), s
        sigma = np.sqrt(draws * expected * (1 - expected)) + 1e-9
        assert np.max(np.abs(counts - draws * expected) / sigma) < 4.5, s


def test_what_cannot_be_generated_is_refused():
    model, variables = make("llama")
    decoder = Decoder(model, variables)
    cases: Any = (
        ([[]], 3, "text 0: expected a token"),
        ([[1], [1] * 60], 9, "text 1 has 60 tokens, and 9 more"),
        ([[VOCAB]], 3, f"has the id {VOCAB}, but the vocabulary ends at {VOCAB - 1}"),
    )
    for prompts, most, message in cases:
        with pytest.raises(FwError, match=message):
            run(decoder, prompts, [Sampling()] * len(prompts), most=most)
    with pytest.raises(FwError, match="BertConfig does not generate"):
        Decoder(bert(BertConfig(9, 8, 1, 2, 8, num_labels=2, task="token_classification")), {})
    with pytest.raises(FwError, match="cache 'int4' is unknown; choose one of f32, int8"):
        Decoder(model, variables, cache="int4")
    with pytest.raises(FwError, match="mesh axis 'pipe'"):
        Decoder(model, variables, make_mesh("pipe=2"), rules())
    wide = llama(dataclasses.replace(model.config, vocab_size=70))
    with pytest.raises(FwError, match="draft: has 70 words, the model 61"):
        next(speculate(decoder, Decoder(wide, {}), [[1]], [Sampling()], most=2))
    ranges: Any = (("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("min_p", 2.0),
                        ("repetition_penalty", 0.0), ("seed", 2**32))  # fmt: skip
    for name, value in ranges:
        with pytest.raises(FwError, match=f"{name} is"):
            Sampling(**{name: value})
