"""BERT (Devlin et al. 2018, arXiv:1810.04805).

The numbers are those of Hugging Face's Bert classes. Rows may hold several texts (`segment_ids`):
attention and positions restart at each, so packed and unpacked batches give the same outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from fw.errors import FwError
from fw.labels import PROBLEMS
from fw.model import Batch, Model, from_nnx
from fw.models import names
from fw.models.layers import Embedding, LayerNorm, embeddings
from fw.models.names import Name
from fw.models.postnorm import Encoder, Head, Shape, check


@dataclass(frozen=True)
class BertConfig:
    """The fields of a BERT `config.json` that change the computation, under their own names.

    And four that say what the model is for: `task`, one of `fw.models.heads.TASKS`; `num_labels` of
    a classifier; of an embedding, `pooling` ("mean" or "cls") and whether to `normalize` it. Three
    say how it is computed: `microbatches` and `remat`, as in `sharding.pipeline`; `scan`, as in
    `Stack`. `head_size` is of heads that are not hidden_size / num_attention_heads wide, as where
    some were taken out; transformers knows no such model.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_labels: int
    task: str
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    hidden_act: str = "gelu"
    head_size: int | None = None
    pooling: str = "mean"
    normalize: bool = True
    microbatches: int = 1
    remat: str | None = None
    scan: bool = True

    model_type: ClassVar[str] = "bert"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        check(
            self,
            size="hidden_size",
            heads_="num_attention_heads",
            rates=rates,
            head_size=self.head_size,
        )
        if self.hidden_act != "gelu":
            raise FwError(f"hidden_act {self.hidden_act!r} is not supported; expected 'gelu'")

    @property
    def positions(self) -> int:
        """The tokens that a text may have."""
        return self.max_position_embeddings

    @property
    def shape(self) -> Shape:
        """The numbers of the layers."""
        return Shape(
            size=self.hidden_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            inner=self.intermediate_size,
            epsilon=self.layer_norm_eps,
            std=self.initializer_range,
            dropout=self.hidden_dropout_prob,
            attention_dropout=self.attention_probs_dropout_prob,
            microbatches=self.microbatches,
            remat=self.remat,
            scan=self.scan,
            head_size=self.head_size,
        )

    @property
    def head(self) -> Head:
        """What the encoder is for; the classifier has its own dropout where one is given."""
        own = self.classifier_dropout
        return Head(
            self.task,
            self.num_labels,
            dropout=self.hidden_dropout_prob if own is None else own,
            pooling=self.pooling,
            normalize=self.normalize,
        )


class Embeddings(nnx.Module):
    """Word + position + type, normalised; positions begin at `first` of their table."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs, first: int = 0):
        size, std = config.hidden_size, config.initializer_range
        self.word = Embedding(config.vocab_size, size, ("vocab", "embed"), std=std, rngs=rngs)
        self.position = Embedding(
            config.max_position_embeddings, size, ("positions", "embed"), std=std, rngs=rngs
        )
        self.type = Embedding(config.type_vocab_size, size, ("types", "embed"), std=std, rngs=rngs)
        self.norm = LayerNorm(size, epsilon=config.layer_norm_eps)
        self.first = first

    def __call__(self, batch: Batch) -> jax.Array:
        types = batch.get("token_type_ids", jnp.zeros((), jnp.int32))
        ids = [batch["input_ids"], batch["position_ids"] + self.first, types]
        return self.norm(embeddings([self.word, self.position, self.type], ids))


def bert(config: BertConfig) -> Model:
    """The model record of a BERT.

    `apply` takes the batch of `fw.data` ([B, L] `input_ids`, `segment_ids`, `position_ids`,
    optionally `token_type_ids`; for whole texts also `first` [B, S]) and returns what
    `fw.models.heads` says of the task.

    >>> config = BertConfig(30, 8, 1, 2, 16, num_labels=3, task="token_classification")
    >>> model = bert(config)
    >>> ids = jnp.ones((2, 5), jnp.int32)
    >>> batch = {"input_ids": ids, "segment_ids": ids, "position_ids": ids}
    >>> variables = jax.eval_shape(model.init, jax.random.key(0))
    >>> jax.eval_shape(model.apply, variables, batch)[0].shape
    (2, 5, 3)
    """

    def build(rngs: nnx.Rngs) -> Encoder:
        return Encoder(Embeddings(config, rngs), config.shape, config.head, rngs)

    return from_nnx(config, build, lambda module, batch, key, _: module(batch, key))


def hf_names(config: BertConfig) -> Iterator[Name]:
    """How transformers calls the parameters."""
    yield from encoder_names(config, "bert")
    match config.task:
        case "masked_lm":
            yield from names.dense("words/dense", "cls.predictions.transform.dense")
            yield from names.norm("words/norm", "cls.predictions.transform.LayerNorm")
            yield Name("words/bias", "cls.predictions.bias")
        case "question_answering":
            yield from names.dense("classifier", "qa_outputs")
        case task if task in PROBLEMS:
            yield from names.dense("pooler", "bert.pooler.dense")
            yield from names.dense("classifier", "classifier")
        case "token_classification":
            yield from names.dense("classifier", "classifier")


def encoder_names(config: BertConfig, prefix: str) -> Iterator[Name]:
    """The names of the encoder, which are RoBERTa's as well but for the prefix."""
    for ours, theirs in (
        ("word", "word_embeddings"),
        ("position", "position_embeddings"),
        ("type", "token_type_embeddings"),
    ):
        yield from names.table(f"embeddings/{ours}", f"{prefix}.embeddings.{theirs}")
    yield from names.norm("embeddings/norm", f"{prefix}.embeddings.LayerNorm")
    for i in range(config.num_hidden_layers):
        theirs = f"{prefix}.encoder.layer.{i}"
        ours, at = names.of_layer(i, scan=config.scan)
        for name in ("query", "key", "value"):
            lin = f"{theirs}.attention.self.{name}"
            yield from names.dense(f"{ours}/attention/{name}", lin, **at)
        out = f"{theirs}.attention.output"
        yield from names.dense(f"{ours}/attention/out", f"{out}.dense", **at)
        yield from names.norm(f"{ours}/attention_norm", f"{out}.LayerNorm", **at)
        yield from names.dense(f"{ours}/up", f"{theirs}.intermediate.dense", **at)
        yield from names.dense(f"{ours}/down", f"{theirs}.output.dense", **at)
        yield from names.norm(f"{ours}/norm", f"{theirs}.output.LayerNorm", **at)
