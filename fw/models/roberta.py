"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT with other data and a longer training.

What differs in the arithmetic: positions begin behind the padding's place in their table, and a
text's classifier drops out before its dense layer, too. XLM-RoBERTa is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from flax import nnx

from fw.errors import FwError
from fw.labels import PROBLEMS
from fw.model import Model, from_nnx
from fw.models import names
from fw.models.bert import BertConfig, Embeddings, encoder_names
from fw.models.names import Name
from fw.models.postnorm import Encoder, Head


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The fields of a RoBERTa `config.json` that change the computation, as in `BertConfig`."""

    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1

    model_type: ClassVar[str] = "roberta"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        super().__post_init__()
        if self.positions < 1:
            raise FwError(
                f"max_position_embeddings {self.max_position_embeddings} leaves no position behind "
                f"pad_token_id {self.pad_token_id}"
            )

    @property
    def positions(self) -> int:
        """The tokens that a text may have: those up to the padding's are no positions."""
        return self.max_position_embeddings - self.pad_token_id - 1

    @property
    def head(self) -> Head:
        """What the encoder is for."""
        head = super().head
        return replace(head, pool_dropout=head.dropout)


class XlmRobertaConfig(RobertaConfig):
    """The same, under another name."""

    model_type: ClassVar[str] = "xlm-roberta"


def roberta(config: RobertaConfig) -> Model:
    """The model record of a RoBERTa; its batches and outputs are those of `bert`.

    >>> import jax
    >>> model = roberta(RobertaConfig(30, 8, 1, 2, 16, num_labels=3, task="masked_lm"))
    >>> ids = jax.numpy.ones((2, 5), jax.numpy.int32)
    >>> batch = {"input_ids": ids, "segment_ids": ids, "position_ids": ids}
    >>> variables = jax.eval_shape(model.init, jax.random.key(0))
    >>> jax.eval_shape(model.apply, variables, batch)[0].shape
    (2, 5, 30)
    """

    def build(rngs: nnx.Rngs) -> Encoder:
        embeddings = Embeddings(config, rngs, first=config.pad_token_id + 1)
        return Encoder(embeddings, config.shape, config.head, rngs)

    return from_nnx(config, build, lambda module, batch, key, _: module(batch, key))


def hf_names(config: RobertaConfig) -> Iterator[Name]:
    """How transformers calls the parameters."""
    yield from encoder_names(config, "roberta")
    match config.task:
        case "masked_lm":
            yield from names.dense("words/dense", "lm_head.dense")
            yield from names.norm("words/norm", "lm_head.layer_norm")
            yield Name("words/bias", "lm_head.bias")
        case "question_answering":
            yield from names.dense("classifier", "qa_outputs")
        case task if task in PROBLEMS:
            yield from names.dense("pooler", "classifier.dense")
            yield from names.dense("classifier", "classifier.out_proj")
        case "token_classification":
            yield from names.dense("classifier", "classifier")
