"""The configs of ViT, DeiT and DINOv2: what they share, and what each calls its own.

`vit` makes the models of them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from fw.errors import FwError
from fw.models.checks import at_least, one_of, rates
from fw.models.postnorm import Shape
from sharding.parallel.pipeline import REMAT

WITH_TEACHER = "DeiTForImageClassificationWithTeacher"
"""transformers' class of a DeiT with two classifiers."""

MOST_POSITIONS = 2**20
"""Tokens that an image may have."""

Size = int | tuple[int, int]


def _square(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True, kw_only=True)
class Patches:
    """The fields that the `config.json`s of the families share and that change the computation.

    And six of our own: `task` and `num_labels`; `microbatches`, `remat` and `scan`, as in `Stack`;
    `head_size`, as in `BertConfig`.
    Sizes are those of a square, or height and width.
    """

    image_size: Size = field(metadata={"unbounded": True})
    patch_size: Size
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_labels: int
    task: str = "image_classification"
    num_channels: int = 3
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    hidden_act: str = "gelu"
    head_size: int | None = None
    microbatches: int = 1
    remat: str | None = None
    scan: bool = True

    model_type: ClassVar[str]
    tokens: ClassVar[int] = 1
    """Those before the patches."""
    paths: ClassVar[Mapping[str, str]] = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "up": "intermediate.dense",
        "down": "output.dense",
    }
    """What of a layer is called in a way of the family's own."""

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        one_of(self, task=("image_classification",), hidden_act=("gelu",), remat=REMAT)
        at_least(self, 1, "image_size", "patch_size", "num_channels", "num_labels", "hidden_size")
        at_least(self, 1, "num_hidden_layers", "num_attention_heads")
        rates(self, "hidden_dropout_prob", "attention_probs_dropout_prob")
        if self.head_size is not None:
            at_least(self, 1, "head_size")
        if self.head_size is None and self.hidden_size % self.num_attention_heads:
            raise FwError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if not self.tokens < self.positions <= MOST_POSITIONS:
            raise FwError(
                f"image_size {self.image_size} has no patches of {self.patch_size}, or more than "
                f"{MOST_POSITIONS}"
            )

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of an image."""
        return _square(self.image_size)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return _square(self.patch_size)

    @property
    def inner(self) -> int:
        """Size of the hidden layer of an MLP."""
        raise NotImplementedError

    @property
    def scale(self) -> float | None:
        """What the scales of sublayers begin with; None where there are none."""
        return None

    @property
    def rates(self) -> tuple[float, float]:
        """How often a number that a sublayer adds is dropped, and how often all of an image's."""
        return self.hidden_dropout_prob, 0.0

    @property
    def positions(self) -> int:
        """The tokens of an image."""
        (height, width), (down, across) = self.image, self.patch
        return self.tokens + (height // down) * (width // across)

    @property
    def shape(self) -> Shape:
        """The numbers of the layers."""
        return Shape(
            size=self.hidden_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            inner=self.inner,
            epsilon=self.layer_norm_eps,
            std=self.initializer_range,
            dropout=self.hidden_dropout_prob,
            attention_dropout=self.attention_probs_dropout_prob,
            microbatches=self.microbatches,
            remat=self.remat,
            scan=self.scan,
            head_size=self.head_size,
        )


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Patches):
    """The fields of a ViT `config.json`."""

    intermediate_size: int

    model_type: ClassVar[str] = "vit"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        super().__post_init__()
        at_least(self, 1, "intermediate_size")

    @property
    def inner(self) -> int:
        """Size of the hidden layer of an MLP."""
        return self.intermediate_size


@dataclass(frozen=True, kw_only=True)
class DeiTConfig(ViTConfig):
    """The fields of a DeiT `config.json`.

    And one of our own: with `teacher`, the token of distillation has a classifier as well, and the
    logits are the mean of the two.
    """

    teacher: bool = False

    model_type: ClassVar[str] = "deit"
    tokens: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True)
class Dinov2Config(Patches):
    """The fields of a DINOv2 `config.json`; `use_swiglu_ffn` is not supported.

    And one of our own: `inner_size`, of the hidden layer of an MLP, where that is no multiple.
    """

    mlp_ratio: int = 4
    inner_size: int | None = None
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    layer_norm_eps: float = 1e-6
    use_mask_token: bool = True

    model_type: ClassVar[str] = "dinov2"
    any_size: ClassVar[bool] = True  # positions are looked up between those that were learnt
    paths: ClassVar[Mapping[str, str]] = {
        "norm1": "norm1",
        "norm2": "norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        super().__post_init__()
        at_least(self, 1, "mlp_ratio", *(["inner_size"] if self.inner_size is not None else []))
        rates(self, "drop_path_rate")

    @property
    def inner(self) -> int:
        """Size of the hidden layer of an MLP."""
        return self.inner_size or self.hidden_size * self.mlp_ratio

    @property
    def scale(self) -> float | None:
        """What the scales of sublayers begin with."""
        return self.layerscale_value

    @property
    def rates(self) -> tuple[float, float]:
        """How often a number that a sublayer adds is dropped, and how often all of an image's."""
        return 0.0, self.drop_path_rate


def read_deit_config(source: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` with the field `teacher`, which its class says."""
    return {**source, "teacher": source.get("architectures") == [WITH_TEACHER]}


def write_deit_config(config: DeiTConfig) -> dict[str, Any]:
    """The keys of a DeiT's `config.json`, its class among them where there is a second one."""
    found = asdict(config)
    return found | {"architectures": [WITH_TEACHER]} if found.pop("teacher") else found
