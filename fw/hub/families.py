"""What is particular to a family of models: one row of a table for each `model_type`.

A row pairs fw's model and config with the class names, tensor names and fixed settings of Hugging
Face transformers. `config` and `folder` do the rest, the same for all.
"""

import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from reprlib import repr as shown
from typing import Any

import jax

from fw.errors import FwError
from fw.hub.files import AnyTensor, Tensors
from fw.hub.header import shown_name
from fw.labels import PROBLEMS
from fw.model import Model
from fw.models import (
    bert,
    distilbert,
    dlrm,
    efficientnet,
    ft_transformer,
    llama,
    mlp,
    modernbert,
    resnet,
    roberta,
    two_tower,
    unet,
    vit,
    vit_config,
)
from fw.models.names import Name
from fw.options import COMPUTED
from sharding import paths


@dataclass(frozen=True)
class Family:
    """A family of models, as transformers stores it.

    Attributes:
      config: a dataclass with a `model_type`; its fields are keys of `config.json`, but for `own`.
      model: makes the model of a config.
      names: how a config's parameters are called.
      architectures: transformers' class by task.
      variants: the task by further classes, which `reads` and `writes` tell apart.
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
    variants: Mapping[str, str] = types.MappingProxyType({})
    fixed: Mapping[str, Any] = types.MappingProxyType({})
    reads: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    writes: Callable[[Any], Mapping[str, Any]] = dataclasses.asdict
    stacked: bool = False

    @property
    def own(self) -> tuple[str, ...]:
        """Fields of the config that are no keys of `config.json`."""
        return (*OWN, *(EMBEDDED if "embedding" in self.architectures else ()))

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


OWN = ("task", "num_labels", *COMPUTED)
"""Fields of a config that say what a model is for and how it is computed."""

EMBEDDED = ("pooling", "normalize")
"""Fields that sentence-transformers' files say, of a family that makes embeddings."""


def own_family(
    config: Callable[..., Any],
    model: Callable[[Any], Model],
    tasks: Iterable[str],
    head: tuple[str, ...] = (),
) -> Family:
    """The family of a model that has no home at Hugging Face.

    Its tensors are called as our paths are, with "." for "/": "units.0.kernel", and "state.…" for
    what is not trained. A row in `FAMILIES` with the config's `model_type` makes `load` and `save`
    know it.

    Fields of the config may be bool, int, float, str, None, unions of them, and tuples of them,
    nested as one likes: `tuple[tuple[str, int], ...]`. What a `config.json` says is checked: an
    integer is at least 1 and at most the largest size of any tensor, or their number; a float is at
    least 0. `field(metadata={"unbounded": True})` lifts the upper bound of integers, such as the
    seed of a hash, that size no array and count no layers; `"signed"` also takes what is below.
    Fields called as those in `OWN` say how a model is used or computed, and are not kept.

    Args:
      config: the dataclass, with `model_type` and a field `task`; `num_labels` if it has labels.
      model: makes the model of a config.
      tasks: what it can be made for.
      head: beginnings of the names of tensors that a folder may lack, and that are then made anew;
        those with an axis "labels" are also where the labels asked for are others than the
        folder's.

    >>> from dataclasses import dataclass
    >>> from typing import ClassVar
    >>> import jax.numpy as jnp
    >>> @dataclass(frozen=True)
    ... class LineConfig:
    ...     sizes: tuple[int, ...]
    ...     task: str = "ranking"
    ...     model_type: ClassVar[str] = "line"
    >>> def line(config):
    ...     init = lambda key: {"params": {"w": {"kernel": jnp.zeros(config.sizes)}}, "state": {}}
    ...     return Model(config, init, print, {"params": {"w": {"kernel": ("embed", "mlp")}}})
    >>> family = own_family(LineConfig, line, ["ranking"])
    >>> family.architectures, [name.tensor for name in family.names(LineConfig((2, 3)))]
    ({'ranking': 'LineForRanking'}, ['w.kernel'])
    """
    name = getattr(config, "__name__", "").removesuffix("Config")
    classes = {task: f"{name}For{task.title().replace('_', '')}" for task in tasks}
    return Family(config, model, partial(_by_path, model), classes, prefix="", head=head)


def _by_path(model: Callable[[Any], Model], config: Any) -> Iterator[Name]:
    for path in paths(jax.eval_shape(model(config).init, jax.random.key(0))):
        kind, _, below = path.partition("/")
        tensor = below if kind == "params" else path
        yield Name(below, tensor.replace("/", "."), kind=kind)


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

_TABULAR = ("tabular_classification", "tabular_regression")

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
        "vit": Family(
            vit_config.ViTConfig,
            vit.vit,
            vit.hf_names,
            architectures={"image_classification": "ViTForImageClassification"},
            prefix="vit.",
            head=("vit.pooler.", "classifier."),
            buffers=("embeddings.mask_token",),
        ),
        "deit": Family(
            vit_config.DeiTConfig,
            vit.vit,
            vit.hf_names,
            architectures={"image_classification": "DeiTForImageClassification"},
            prefix="deit.",
            head=("deit.pooler.", "classifier.", "cls_classifier.", "distillation_classifier."),
            buffers=("embeddings.mask_token",),
            variants={vit_config.WITH_TEACHER: "image_classification"},
            reads=vit_config.read_deit_config,
            writes=vit_config.write_deit_config,
        ),
        "dinov2": Family(
            vit_config.Dinov2Config,
            vit.vit,
            vit.hf_names,
            architectures={"image_classification": "Dinov2ForImageClassification"},
            prefix="dinov2.",
            head=("classifier.",),
            fixed={"use_swiglu_ffn": False},
        ),
        "resnet": Family(
            resnet.ResNetConfig,
            resnet.resnet,
            resnet.hf_names,
            architectures={"image_classification": "ResNetForImageClassification"},
            prefix="resnet.",
            head=("classifier.",),
            writes=resnet.write_config,
        ),
        "unet": own_family(unet.UNetConfig, unet.unet, ["segmentation"]),
        "mlp": own_family(mlp.MLPConfig, mlp.mlp, _TABULAR),
        "ft_transformer": own_family(
            ft_transformer.FTTransformerConfig, ft_transformer.ft_transformer, _TABULAR
        ),
        "dlrm": own_family(dlrm.DLRMConfig, dlrm.dlrm, ["ranking"]),
        "two_tower": own_family(two_tower.TwoTowerConfig, two_tower.two_tower, ["retrieval"]),
        "efficientnet_lite": Family(
            efficientnet.EfficientNetConfig,
            efficientnet.efficientnet,
            efficientnet.torch_names,
            architectures={"image_classification": "EfficientNet"},
            prefix="",
            head=("_fc.",),
        ),
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
