"""What is particular to a family of models: one row of a table for each `model_type`.

A row pairs fw's model and config with the class names, tensor names and fixed settings of Hugging
Face transformers. `config` and `folder` do the rest, the same for all.
"""

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from fw.errors import FwError
from fw.hub.files import Tensor
from fw.model import Model
from fw.models.bert import BertConfig, bert, hf_names


@dataclass(frozen=True)
class Family:
    """A family of models, as transformers stores it.

    Attributes:
      config: a dataclass; besides `task` and `num_labels`, its fields are keys of `config.json`.
      model: makes the model of a config.
      names: a config's parameters: (our path, their tensor, whether it is transposed).
      architectures: transformers' class by task.
      prefix: what the names of the encoder's tensors begin with, except in folders of the encoder
        alone.
      head: beginnings of the names that a folder may lack, or have in vain.
      buffers: endings of names that hold no parameter.
      fixed: keys of `config.json` with the only value that the model implements.
    """

    config: Callable[..., Any]
    model: Callable[[Any], Model]
    names: Callable[[Any], Iterable[tuple[str, str, bool]]]
    architectures: Mapping[str, str]
    prefix: str
    head: tuple[str, ...]
    buffers: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = types.MappingProxyType({})

    def by_name(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a folder by the names that `names` uses.

        Raises:
          FwError: two tensors for one name.
        """
        bare = not any(name.startswith(self.prefix) for name in tensors)
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = self.prefix + name if bare else name
            # From TensorFlow's first checkpoints; bert-base-uncased has them to this day.
            for old, new in (("LayerNorm.gamma", "weight"), ("LayerNorm.beta", "bias")):
                if full.endswith(old):
                    full = f"{full.removesuffix(old)}LayerNorm.{new}"
            if full in found:
                raise FwError(f"{tensor.file}: both {found[full].name!r} and {name!r} are {full!r}")
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


FAMILIES: Mapping[str, Family] = types.MappingProxyType(
    {
        "bert": Family(
            BertConfig,
            bert,
            hf_names,
            architectures={
                "token_classification": "BertForTokenClassification",
                "sequence_classification": "BertForSequenceClassification",
            },
            prefix="bert.",
            head=("bert.pooler.", "classifier."),
            buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
            fixed={
                "position_embedding_type": "absolute",
                "is_decoder": False,
                "add_cross_attention": False,
            },
        ),
    }
)
"""The families that fw knows, by `model_type`."""


def family_of(source: Mapping[str, Any], where: object) -> Family:
    """The family that a `config.json` names.

    >>> family_of({"model_type": "brt"}, "config.json")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: config.json: model_type is 'brt'; expected one of bert
    """
    name = source.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise FwError(
            f"{where}: model_type is {shown(name)}; expected one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]
