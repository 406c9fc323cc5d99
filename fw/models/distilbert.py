"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): half of BERT's layers, and no token types."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import nnx

from fw.errors import FwError
from fw.labels import PROBLEMS
from fw.model import Batch, Model, from_nnx
from fw.models import names
from fw.models.layers import Embedding, LayerNorm, embeddings
from fw.models.names import Name
from fw.models.postnorm import Encoder, Head, Shape, check

EPSILON = 1e-12
"""Of the norms; no key of `config.json` says it."""


@dataclass(frozen=True)
class DistilBertConfig:
    """The fields of a DistilBERT `config.json` that change the computation, under their own names.

    And those that say what the model is for and how it is computed, as in `BertConfig`.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int
    num_labels: int
    task: str
    max_position_embeddings: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    initializer_range: float = 0.02
    activation: str = "gelu"
    head_size: int | None = None
    pooling: str = "mean"
    normalize: bool = True
    microbatches: int = 1
    remat: str | None = None
    scan: bool = True

    model_type: ClassVar[str] = "distilbert"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        rates = ("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout")
        check(self, size="dim", heads_="n_heads", rates=rates, head_size=self.head_size)
        if self.activation != "gelu":
            raise FwError(f"activation {self.activation!r} is not supported; expected 'gelu'")

    @property
    def positions(self) -> int:
        """The tokens that a text may have."""
        return self.max_position_embeddings

    @property
    def shape(self) -> Shape:
        """The numbers of the layers."""
        return Shape(
            size=self.dim,
            layers=self.n_layers,
            heads=self.n_heads,
            inner=self.hidden_dim,
            epsilon=EPSILON,
            std=self.initializer_range,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            microbatches=self.microbatches,
            remat=self.remat,
            scan=self.scan,
            head_size=self.head_size,
        )

    @property
    def head(self) -> Head:
        """What the encoder is for; each task has a dropout of its own."""
        rates = {
            "question_answering": self.qa_dropout,
            **dict.fromkeys(PROBLEMS, self.seq_classif_dropout),
        }
        return Head(
            self.task,
            self.num_labels,
            dropout=rates.get(self.task, self.dropout),
            activation=jax.nn.relu,
            pooling=self.pooling,
            normalize=self.normalize,
        )


class Embeddings(nnx.Module):
    """Word + position, normalised."""

    def __init__(self, config: DistilBertConfig, rngs: nnx.Rngs):
        size, std = config.dim, config.initializer_range
        self.word = Embedding(config.vocab_size, size, ("vocab", "embed"), std=std, rngs=rngs)
        self.position = Embedding(
            config.max_position_embeddings, size, ("positions", "embed"), std=std, rngs=rngs
        )
        self.norm = LayerNorm(size, epsilon=EPSILON)

    def __call__(self, batch: Batch) -> jax.Array:
        ids = [batch["input_ids"], batch["position_ids"]]
        return self.norm(embeddings([self.word, self.position], ids))


def distilbert(config: DistilBertConfig) -> Model:
    """The model record of a DistilBERT; its batches and outputs are those of `bert`.

    >>> model = distilbert(DistilBertConfig(30, 8, 1, 2, 16, num_labels=0, task="embedding"))
    >>> ids = jax.numpy.ones((2, 5), jax.numpy.int32)
    >>> batch = {"input_ids": ids, "segment_ids": ids, "position_ids": ids, "first": ids[:, :1]}
    >>> variables = jax.eval_shape(model.init, jax.random.key(0))
    >>> jax.eval_shape(model.apply, variables, batch)[0].shape
    (2, 1, 8)
    """

    def build(rngs: nnx.Rngs) -> Encoder:
        return Encoder(Embeddings(config, rngs), config.shape, config.head, rngs)

    return from_nnx(config, build, lambda module, batch, key, _: module(batch, key))


def hf_names(config: DistilBertConfig) -> Iterator[Name]:
    """How transformers calls the parameters."""
    for ours in ("word", "position"):
        yield from names.table(f"embeddings/{ours}", f"distilbert.embeddings.{ours}_embeddings")
    yield from names.norm("embeddings/norm", "distilbert.embeddings.LayerNorm")
    for i in range(config.n_layers):
        theirs = f"distilbert.transformer.layer.{i}"
        ours, at = names.of_layer(i, scan=config.scan)
        for name in ("query", "key", "value", "out"):
            lin = f"{theirs}.attention.{name if name == 'out' else name[0]}_lin"
            yield from names.dense(f"{ours}/attention/{name}", lin, **at)
        yield from names.norm(f"{ours}/attention_norm", f"{theirs}.sa_layer_norm", **at)
        yield from names.dense(f"{ours}/up", f"{theirs}.ffn.lin1", **at)
        yield from names.dense(f"{ours}/down", f"{theirs}.ffn.lin2", **at)
        yield from names.norm(f"{ours}/norm", f"{theirs}.output_layer_norm", **at)
    match config.task:
        case "masked_lm":
            yield from names.dense("words/dense", "vocab_transform")
            yield from names.norm("words/norm", "vocab_layer_norm")
            yield Name("words/bias", "vocab_projector.bias")
        case "question_answering":
            yield from names.dense("classifier", "qa_outputs")
        case task if task in PROBLEMS:
            yield from names.dense("pooler", "pre_classifier")
            yield from names.dense("classifier", "classifier")
        case "token_classification":
            yield from names.dense("classifier", "classifier")
