"""What is particular to a family of models: one row of a table for each `model_type`.

A row pairs fw's model and config with the class names, tensor names and fixed settings of Hugging
Face transformers. `config` and `folder` do the rest, the same for all.
"""

import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from fw.errors import FwError
from fw.hub.files import AnyTensor, Tensors
from fw.hub.header import shown_name
from fw.labels import PROBLEMS
from fw.model import Model
from fw.models import bert, distilbert, llama, modernbert, roberta
from fw.models.names import Name


@dataclass(frozen=True)
class Family:
    """A family of models, as transformers stores it.

    Attributes:
      config: a dataclass with a `model_type`; its fields are keys of `config.json`, but for those
        that say what the model is for (`OWN`).
      model: makes the model of a config.
      names: how a config's parameters are called.
      architectures: transformers' class by task.
      prefix: what the names of the encoder's tensors begin with, except in folders of the encoder
        alone.
      head: beginnings of the names that a folder may lack, or have in vain.
      buffers: endings of names that hold no parameter.
      fixed: keys of `config.json` with the only value that the model implements.
      reads: brings a `config.json` into the spelling of `config`'s fields.
      writes: the keys of a `config.json`, and fields that are none.
      stacked: whether layers are stacked even where `fw.models.stack.scans` would have them apart;
        generation, which compiles many programs, takes them apart when a text is long.
    """

    config: Callable[..., Any]
    model: Callable[[Any], Model]
    names: Callable[[Any], Iterable[Name]]
    architectures: Mapping[str, str]
    prefix: str
    head: tuple[str, ...]
    buffers: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = types.MappingProxyType({})
    reads: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    writes: Callable[[Any], Mapping[str, Any]] = dataclasses.asdict
    stacked: bool = False

    def stored(self, config: Any) -> Iterator[Name]:
        """`names` as a folder of this config has them: without the prefix, if it has no head."""
        alone = config.task == "embedding"
        for name in self.names(config):
            bare = name.tensor.removeprefix(self.prefix)
            yield dataclasses.replace(name, tensor=bare) if alone else name

    def by_name(self, tensors: Tensors) -> dict[str, AnyTensor]:
        """The tensors of a folder by the names that `names` uses.

        Raises:
          FwError: two tensors for one name.
        """
        bare = not any(name.startswith(self.prefix) for name in tensors)
        found: dict[str, AnyTensor] = {}
        for name, tensor in tensors.items():
            full = self.prefix + name if bare else name
            # From TensorFlow's first checkpoints; bert-base-uncased has them to this day.
            for old, new in (("LayerNorm.gamma", "weight"), ("LayerNorm.beta", "bias")):
                if full.endswith(old):
                    full = f"{full.removesuffix(old)}LayerNorm.{new}"
            if full in found:
                both = f"{shown_name(found[full].name)} and {shown_name(name)}"
                raise FwError(f"{tensor.file}: both {both} are {shown_name(full)}")
            found[full] = tensor
        return found

    def may_lack(self, name: str) -> bool:
        """Whether a tensor belongs to the head."""
        return name.startswith(self.head)

    def may_ignore(self, name: str) -> bool:
        """Whether a tensor that no parameter uses does no harm: it is not the encoder's."""
        return (
            not name.startswith(self.prefix)
            or name.startswith(self.head)
            or (name.endswith(self.buffers))
        )


OWN = ("task", "num_labels", "pooling", "normalize", "microbatches", "remat", "scan")
"""Fields of a config that are no keys of `config.json`."""


def _architectures(name: str) -> dict[str, str]:
    return {
        "token_classification": f"{name}ForTokenClassification",
        **dict.fromkeys(PROBLEMS, f"{name}ForSequenceClassification"),
        "question_answering": f"{name}ForQuestionAnswering",
        "masked_lm": f"{name}ForMaskedLM",
        "embedding": f"{name}Model",
    }


_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_ENCODER = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
_ROBERTA = Family(
    roberta.RobertaConfig,
    roberta.roberta,
    roberta.hf_names,
    architectures=_architectures("Roberta"),
    prefix="roberta.",
    head=("roberta.pooler.", "classifier.", "lm_head.", "qa_outputs."),
    buffers=_BUFFERS,
    fixed=_ENCODER,
)

FAMILIES: Mapping[str, Family] = types.MappingProxyType(
    {
        "bert": Family(
            bert.BertConfig,
            bert.bert,
            bert.hf_names,
            architectures=_architectures("Bert"),
            prefix="bert.",
            head=("bert.pooler.", "classifier.", "cls.", "qa_outputs."),
            buffers=_BUFFERS,
            fixed=_ENCODER,
        ),
        "roberta": _ROBERTA,
        "xlm-roberta": dataclasses.replace(
            _ROBERTA,
            config=roberta.XlmRobertaConfig,
            architectures=_architectures("XLMRoberta"),
        ),
        "distilbert": Family(
            distilbert.DistilBertConfig,
            distilbert.distilbert,
            distilbert.hf_names,
            architectures=_architectures("DistilBert"),
            prefix="distilbert.",
            head=("pre_classifier.", "classifier.", "vocab_", "qa_outputs."),
            buffers=_BUFFERS,
            fixed={"sinusoidal_pos_embds": False},
        ),
        "modernbert": Family(
            modernbert.ModernBertConfig,
            modernbert.modernbert,
            modernbert.hf_names,
            architectures=_architectures("ModernBert"),
            prefix="model.",
            head=("head.", "classifier.", "decoder."),
            reads=modernbert.read_config,
            writes=modernbert.write_config,
        ),
        **{
            name: Family(
                llama.LlamaConfig,
                llama.llama,
                llama.hf_names,
                architectures={"causal_lm": architecture},
                prefix="model.",
                head=("lm_head.",),
                buffers=(".rotary_emb.inv_freq",),
                fixed={"pretraining_tp": 1, "router_jitter_noise": 0.0},
                reads=llama.read_config,
                writes=llama.write_config,
                stacked=True,
            )
            for name, architecture in llama.ARCHITECTURES.items()
        },
    }
)
"""The families that fw knows, by `model_type`."""


def family_of(source: Mapping[str, Any], where: object) -> Family:
    """The family that a `config.json` names.

    >>> family_of({"model_type": "brt"}, "config.json")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: config.json: model_type is 'brt'; expected one of bert, roberta, ...
    """
    name = source.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise FwError(
            f"{where}: model_type is {shown(name)}; expected one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]
