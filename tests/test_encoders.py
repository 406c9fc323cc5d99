"""Every family of encoders and every head: packed as unpacked, on any mesh, through a folder."""

import itertools
import json
from typing import Any

import jax
import numpy as np
import pytest

from fw import hub
from fw.errors import FwError
from fw.hub import FAMILIES
from fw.labels import PROBLEMS
from fw.models import heads
from fw.models.bert import BertConfig
from fw.models.distilbert import DistilBertConfig
from fw.models.modernbert import ModernBertConfig, read_config
from fw.models.roberta import RobertaConfig, XlmRobertaConfig
from sharding import gather, make_mesh, rules
from tests.marks import fast_are
from tests.texts import LENGTHS, ROWS, outputs

SHAPE = (60, 16, 3, 2, 24)  # words, size, layers, heads, inner size
CONFIGS: dict[str, Any] = {
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "xlm-roberta": XlmRobertaConfig,
    "distilbert": DistilBertConfig,
    "modernbert": lambda *args, **more: ModernBertConfig(*args, local_attention=6, **more),
}
LABELS = ("a", "b", "c")


pytestmark = pytest.mark.usefixtures("quickly_compiled")


def make(family, task, **options):
    """A model in which every parameter is random, so that each one matters."""
    labels = LABELS if task in heads.OF_TEXTS else ()
    config = CONFIGS[family](
        *SHAPE,
        **{"num_labels": len(labels), "task": task, "max_position_embeddings": 40, "scan": False}
        | options,
    )
    model, random = FAMILIES[family].model(config), np.random.default_rng(len(family))
    variables = jax.tree.map(
        lambda x: np.asarray(x + random.normal(0, 0.3, x.shape), np.float32),
        model.init(jax.random.key(0)),
    )
    return hub.Loaded(model, variables, labels)


# Every family and every head.
EACH = [(tuple(CONFIGS)[i % len(CONFIGS)], task) for i, task in enumerate(heads.TASKS)]


@pytest.mark.parametrize(
    ("family", "task"), fast_are(EACH, itertools.product(CONFIGS, heads.TASKS))
)
def test_packed_as_unpacked_on_any_mesh_and_back_from_a_folder(family, task, tmp_path):
    made = make(family, task)
    alone = outputs(made, tuple((i,) for i in range(len(LENGTHS))))
    size = {"token_classification": 3, "question_answering": 2,
            "masked_lm": 60, "embedding": 16, **dict.fromkeys(PROBLEMS, 3)}[task]  # fmt: skip
    assert {y.shape[-1] for y in alone} == {size}
    if alone[0].ndim == 1:
        assert np.abs(alone[0] - alone[1]).max() > 1e-3  # texts differ
    for spec in ("data=1", "fsdp=2,sequence=2,tensor=2"):
        for a, b in zip(outputs(made, ROWS, spec), alone, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=spec)

    hub.save(tmp_path / "m", made)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    again = hub.load(tmp_path / "m", mesh=mesh, rules=rules())
    assert (again.model.config, again.labels) == (made.model.config, made.labels)
    assert (again.fresh, again.unused) == ((), ())
    jax.tree.map(np.testing.assert_array_equal, gather(again.variables), made.variables)


@pytest.mark.parametrize("family", fast_are(["bert", "distilbert"], CONFIGS))
def test_another_head_is_made_anew_and_the_encoder_kept(family, tmp_path):
    made = make(family, "masked_lm")
    hub.save(tmp_path / "m", made)
    where = {"mesh": make_mesh("data=1"), "rules": rules()}
    for task in heads.TASKS:
        labels = LABELS if task in heads.OF_TEXTS else None
        found = hub.load(tmp_path / "m", **where, task=task, labels=labels, key=jax.random.key(0))
        assert found.model.config.task == task
        kept = set(found.fresh).isdisjoint
        assert kept(p for p in found.fresh if p.startswith(("embeddings", "stack", "word/")))
        assert all(p.startswith(("classifier", "pooler", "head")) for p in found.fresh), found.fresh
    with pytest.raises(FwError, match="masked_lm has no classes to name"):
        hub.load(tmp_path / "m", **where, labels=("a", "b"))


@pytest.mark.parametrize(
    ("pooling", "normalize", "modules"),
    [
        ("mean", True, ["Transformer", "Pooling", "Normalize"]),
        ("cls", False, ["Transformer", "Pooling"]),
    ],
)
def test_how_a_vector_is_made_goes_out_and_in(tmp_path, pooling, normalize, modules):
    made = make("bert", "embedding", pooling=pooling, normalize=normalize)
    hub.save(tmp_path / "m", made)
    path = tmp_path / "m/modules.json"
    found = [row["type"] for row in json.loads(path.read_text())]
    assert found == [f"sentence_transformers.models.{kind}" for kind in modules]
    where = {"mesh": make_mesh("data=1"), "rules": rules()}
    config = hub.load(tmp_path / "m", **where).model.config
    assert (config.pooling, config.normalize) == (pooling, normalize)
    for text, said in (
        ('[{"type": "sentence_transformers.models.Dense"}]', "module 'Dense'; expected Transf"),
        ('[{"path": ""}]', "expected a list of objects with 'type'"),
        ("{", "expected a list of objects with 'type'"),
    ):
        path.write_text(text)
        with pytest.raises(FwError, match=rf"modules\.json: {said}"):
            hub.load(tmp_path / "m", **where)
    (tmp_path / "m/1_Pooling/config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(FwError, match=r"pools by .*max_tokens.*expected one of pooling_mode_mean"):
        hub.load(tmp_path / "m", **where)


def test_vectors_are_of_length_1_and_means_of_their_text_alone():
    made = make("distilbert", "embedding")
    plain = make("distilbert", "embedding", normalize=False)
    first = make("distilbert", "embedding", normalize=False, pooling="cls")
    for y, mean in zip(outputs(made, ROWS), outputs(plain, ROWS), strict=True):
        np.testing.assert_allclose(y, mean / np.linalg.norm(mean), rtol=1e-5)
    assert not np.allclose(outputs(first, ROWS)[0], outputs(plain, ROWS)[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "poetry"}, "task 'poetry' is unknown"),
        ({"pooling": "max"}, "pooling 'max' is unknown; choose one of mean, cls"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"classifier_pooling": "max"}, "classifier_pooling 'max' is unknown"),
        ({"hidden_activation": "relu"}, "hidden_activation 'relu' is not supported"),
        ({"mlp_dropout": 1.5}, "mlp_dropout 1.5 is no rate"),
    ],
)
def test_a_modernbert_that_cannot_be_computed_is_refused(changes, said):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size")  # fmt: skip
    given = dict(zip(names, SHAPE, strict=True)) | {"num_labels": 2, "task": "embedding"}
    with pytest.raises(FwError, match=said):
        ModernBertConfig(**given | changes)


def test_roberta_needs_positions_behind_its_padding():
    with pytest.raises(FwError, match="max_position_embeddings 2 leaves no position behind pad"):
        RobertaConfig(*SHAPE, num_labels=2, task="embedding", max_position_embeddings=2)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type 'yarn' is not"),
        ({"layer_types": ["sliding_attention"]}, "expected 'full_attention' for one layer of 3"),
    ],
)
def test_layers_that_modernbert_does_not_have(source, said):
    with pytest.raises(FwError, match=said):
        read_config(source)
