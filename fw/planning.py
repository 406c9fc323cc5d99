"""Which layout a training step should have: what `sharding.plan` asks the compilers, of our models.

A `Work` says what is trained; its variants differ in what no loss depends on: what is computed
again, microbatches, the dtype of the optimiser's moments. The steps are those of `fw.step`, the
ones that training takes.

    found = plan_training(Work("llama-2-70b", batch=1024, length=4096), "v5p:8x8x16")
    print(found)
    found.save("plan.json")              # fw finetune --plan plan.json
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from compress.arrays import is_compressed
from compress.transform import named_leaves
from fw import assets
from fw.adaptation import LoraOptions, adapt
from fw.errors import FwError
from fw.hub.config import Head, choose_head, read_config
from fw.hub.families import Family, family_of
from fw.hub.files import CONFIG, read_json
from fw.hub.folder import Loaded, computed
from fw.model import Model
from fw.models.flash import has_cudnn
from fw.models.pixels import normalised
from fw.models.stack_layout import default_microbatches, scans
from fw.optimizer import AdamW, optimizer
from fw.step import abstract_state, make_step
from fw.tasks import make_task
from sharding import Rules, shardings
from sharding import rules as make_rules
from sharding.layout import fit
from sharding.parallel.pipeline import PIPE
from sharding.plan import CHIPS, Hardware, Plan, Variant, hardware, load, plan_variants
from sharding.rules import BATCH

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}


def _llama(vocab: int, width: int, layers: int, heads: int, keys: int, mlp: int, **more: Any):
    sizes = {
        "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys, "intermediate_size": mlp,
    }  # fmt: skip
    return _LLAMA | sizes | more


KNOWN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-2-7b": _llama(32_000, 4096, 32, 32, 32, 11_008),
        "llama-2-13b": _llama(32_000, 5120, 40, 40, 40, 13_824),
        "llama-2-70b": _llama(32_000, 8192, 80, 64, 8, 28_672),
        "llama-3.1-8b": _llama(128_256, 4096, 32, 32, 8, 14_336, rope_theta=500_000.0),
        "llama-3.1-70b": _llama(128_256, 8192, 80, 64, 8, 28_672, rope_theta=500_000.0),
        "llama-3.1-405b": _llama(128_256, 16_384, 126, 128, 8, 53_248, rope_theta=500_000.0),
        "mistral-7b": _llama(32_000, 4096, 32, 32, 8, 14_336) | {"model_type": "mistral"},
        "mixtral-8x7b": _llama(
            32_000, 4096, 32, 32, 8, 14_336, num_local_experts=8, num_experts_per_tok=2
        ) | {"model_type": "mixtral"},
        "qwen3-8b": _llama(151_936, 4096, 36, 32, 8, 12_288, head_dim=128)
        | {"model_type": "qwen3"},
    }
)  # fmt: skip
"""Sizes of models that many train, by name, as their `config.json` has them."""

_SHARES = (1, 2, 4, 8, 16)  # microbatches that are tried


WHOLE = LoraOptions()
"""No adapters: the whole model is trained."""


@dataclass(frozen=True)
class Work:
    """What is to be trained.

    Attributes:
      model: a name of `KNOWN` or of `fw fetch --list`, a model folder, or a `config.json`.
      batch: rows of a step, of all devices together.
      length: tokens of a row; images have none.
      task: as a model's head has it; None takes the config's.
      classes: labels of a head that has some.
      precision: of the step.
      rules: preset of the layout.
      config: keys of the config that are to be others.
      remat: what may be computed again, of those that the model has; None for all that it has.
      moments: of the optimiser, that may be taken.
      accumulate: microbatches that may be taken; None for those that the batch divides into.
      causal_half: whether a model's own FLOPs leave out the half of attention that nobody sees.
      adapters: that may be trained in place of the whole model, which `WHOLE` stands for.
    """

    model: str
    batch: int
    length: int = 128
    task: str | None = None
    classes: int = 2
    precision: str = "bf16_activations"
    rules: str = "fsdp_tensor"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    remat: tuple[str | None, ...] | None = None
    moments: tuple[str, ...] = ("float32",)
    accumulate: tuple[int, ...] | None = None
    causal_half: bool = True
    adapters: tuple[LoraOptions, ...] = (WHOLE,)

    def __post_init__(self):
        """Checks what can be checked before anything is read.

        Raises:
          FwError: the option, its value, and what was expected.
        """
        for name in ("batch", "length", "classes"):
            if getattr(self, name) < 1:
                raise FwError(f"{name} is {getattr(self, name)}; expected 1 or more")


@dataclass(frozen=True)
class _Source:
    """A model's config, read: which family, and how to make it with other settings."""

    family: Family
    source: Mapping[str, Any]
    head: Head

    def model(self, **how: Any) -> Model:
        own = computed(self.family, **({"microbatches": 1, "remat": None, "scan": True} | how))
        config = read_config(self.family, self.source, CONFIG, self.head, 2**31 - 1, own)
        return self.family.model(config)

    def dense(self) -> "_Source":
        """With as many products, but none in vain: in place of experts one, as large as are chosen.

        How rows are brought to their experts may need more, to fill blocks.
        """
        chosen = self.source.get("num_experts_per_tok")
        if not chosen:
            return self
        size = chosen * self.source["intermediate_size"]
        one = {"num_local_experts": 1, "num_experts_per_tok": 1, "intermediate_size": size}
        return replace(self, source={**self.source, **one})

    @property
    def fields(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self.family.config)}  # type: ignore[arg-type]


def source_of(work: Work) -> _Source:
    """The config of a work's model.

    Raises:
      FwError: a name that is not known, a config that is not of a family, or a task that it cannot
        have.
    """
    if work.model in KNOWN:
        found: Mapping[str, Any] = KNOWN[work.model]
    else:
        path = Path(work.model)
        if path.suffix == ".json" and path.is_file():
            found = read_json(path)
        elif (path / CONFIG).is_file():
            found = read_json(path / CONFIG)
        elif path.exists():
            raise FwError(f"{path}: there is no {CONFIG} to plan for")
        else:
            try:
                folder = Path(assets.fetch(work.model))
            except FwError as error:
                names = ", ".join(KNOWN)
                raise FwError(f"{error}; or one of {names}, or a config.json") from None
            if not (folder / CONFIG).is_file():
                raise FwError(f"{work.model} has no {CONFIG}; give one by its path")
            found = read_json(folder / CONFIG)
    found = {**found, **work.config}
    family = family_of(found, work.model)
    tasks = [*family.architectures]
    task = work.task or ("causal_lm" if "causal_lm" in tasks else tasks[0])
    if task not in tasks:
        raise FwError(f"task {task!r}: {work.model} is for {', '.join(tasks)}")
    labels = () if task in _WORDS else tuple(f"LABEL_{n}" for n in range(work.classes))
    if task == "token_classification":
        labels = ("O", *(f"B-{n}" for n in range(1, max(work.classes, 2))))
    found |= {"architectures": [family.architectures[task]]}
    head = choose_head(family, found, work.model, task=task, labels=labels, limit=2**31 - 1)
    return _Source(family, found, head)


_IMAGES = ("image_classification", "segmentation")
_WORDS = ("causal_lm", "masked_lm", "embedding")


def build(
    work: Work,
    source: _Source,
    choices: Mapping[str, str],
    adapters: LoraOptions = WHOLE,
) -> Callable[[AbstractMesh | Mesh], tuple[Callable[..., Any], Sequence[Any]]]:
    """What makes the training step of a work for a mesh, as `sharding.plan` wants it.

    Args:
      work: what is trained.
      source: its model.
      choices: `remat`, `accumulate`, `moments`, as in `fw.recipe.Finetune`.
      adapters: what is trained in place of the whole model; the step takes what is frozen, too.
    """
    table = make_rules(work.rules)
    task = make_task(source.head.task, source.head.labels)
    tx = optimizer(AdamW(moments=choices.get("moments", "float32")), 1000)

    def made(mesh: Any) -> tuple[Callable[..., Any], Sequence[Any]]:
        remat = choices.get("remat", "none")
        how = {
            "remat": None if remat == "none" else remat,
            "microbatches": default_microbatches(mesh),
            "scan": source.family.stacked or scans(mesh),
        }
        model = source.model(**how)
        arrays, pixels = _batch(work, source, model)
        if pixels:
            model = normalised(model, [0.5], [0.5])
        frozen = []
        if adapters.lora:
            model, *frozen = _adapted(model, adapters, mesh, table)
        step = make_step(
            model, task.loss, tx, mesh=mesh, rules=table, precision=work.precision,
            accumulate=int(choices.get("accumulate", "1")),
        )  # fmt: skip
        batch = {}
        for name, (shape, dtype) in arrays.items():
            names = (BATCH, *[None] * (len(shape) - 1))
            where = fit(names, shape, mesh, table, activation=True, path=f"batch/{name}")
            batch[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        return step, (abstract_state(model, tx, mesh, table), batch, *frozen)

    return made


def _adapted(model: Model, adapters: LoraOptions, mesh: Any, table: Rules) -> tuple[Model, Any]:
    """The model whose adapters are trained, and shapes of what is frozen where they lie."""
    found: list[Model] = []

    def split(variables: Any) -> Any:
        made = adapt(Loaded(model, variables, ()), adapters)
        found.append(made.trained.model)
        return made.frozen

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    places = named_leaves(shardings(model.axes, shapes, mesh, table)["params"])[0]
    leaves, tree = named_leaves(jax.eval_shape(split, shapes))
    where = [
        x.place(s) if is_compressed(x) else s for (_, x), (_, s) in zip(leaves, places, strict=True)
    ]
    frozen = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.tree.unflatten(tree, [x for _, x in leaves]),
        jax.tree.unflatten(tree, where),
    )
    return found[-1], frozen


def _batch(
    work: Work, source: _Source, model: Model
) -> tuple[dict[str, tuple[tuple[int, ...], Any]], bool]:
    """Shapes and dtypes of a batch by name, and whether it is of images."""
    rows, length, task = work.batch, work.length, source.head.task
    if task in _IMAGES:
        config = model.config
        side = getattr(config, "size", None) or getattr(config, "image_size", 224)
        height, width = side if isinstance(side, tuple) else (side, side)
        channels = getattr(config, "num_channels", 3)
        labels = (rows,) if task == "image_classification" else (rows, height, width)
        return {
            "images": ((rows, height, width, channels), jnp.uint8),
            "labels": (labels, jnp.int32),
        }, True
    tokens = ((rows, length), jnp.int32)
    found = dict.fromkeys(("input_ids", "segment_ids", "position_ids"), tokens)
    if task in _WORDS:
        return {**found, "targets": tokens}, False
    if task == "token_classification":
        return {**found, "labels": tokens}, False
    if task in ("sequence_classification", "multi_label_classification", "regression"):
        texts = max(length // 8, 1)
        labels: tuple[int, ...] = (rows, texts)
        if task != "sequence_classification":
            labels = (*labels, work.classes)
        kind = jnp.float32 if task == "regression" else jnp.int32
        return {**found, "first": ((rows, texts), jnp.int32), "labels": (labels, kind)}, False
    raise FwError(f"task {task!r} cannot be planned for yet")


def variants(work: Work) -> tuple[list[Variant], _Source]:
    """The ways to write a work's step.

    Raises:
      FwError: as `source_of`; a remat that the model has not.
    """
    source = source_of(work)
    has = "remat" in source.fields
    known: tuple[str | None, ...] = (None, "dots", "layer") if has else (None,)
    remats = work.remat if work.remat is not None else known
    if not has and remats != (None,):
        raise FwError(f"remat: {work.model} has no layers to compute again")
    shares = work.accumulate or tuple(n for n in _SHARES if work.batch % n == 0)
    found = []
    for remat, share, moments, one in product(remats, shares, work.moments, work.adapters):
        choices = {"remat": remat or "none", "accumulate": str(share), "moments": moments}
        if any(other.lora for other in work.adapters):
            choices |= {"lora": f"{one.lora}:{one.lora_base}".removesuffix(":")}
        built = build(work, source, choices, one)
        more: dict[str, Any] = {}
        if one.lora:
            more = {
                "kinds": {2: "frozen"}, "whole": (PIPE,), "flops": model_flops(work, source, 2)
            }  # fmt: skip
        found.append(Variant(built, choices, **more))
    return found, source


def model_flops(work: Work, source: _Source | None = None, products: int = 3) -> float:
    """Products and sums that a step of a work needs: three forward passes, nothing computed twice.

    A backward pass multiplies twice for each product of the forward pass (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1); attention counts whole, or half where it is causal and
    `causal_half` says so.

    Args:
      work: what is trained.
      source: its model, where it was read.
      products: for each with a kernel in the forward pass; 2 where kernels are frozen. What
        adapters multiply beside them is left out.
    """
    from sharding.plan.survey import survey

    source = (source or source_of(work)).dense()
    model = source.model()
    arrays, pixels = _batch(work, source, model)
    if pixels:
        model = normalised(model, [0.5], [0.5])
    variables = jax.eval_shape(model.init, jax.random.key(0))
    batch = {n: jax.ShapeDtypeStruct(shape, dtype) for n, (shape, dtype) in arrays.items()}
    batch.pop("labels", None)
    counted = survey(lambda v, b: model.apply(v, b)[0], (variables, batch))
    half = 0.5 if work.causal_half and source.head.task == "causal_lm" else 1.0
    return products * counted.dense + 3 * half * counted.batched


def plan_training(
    work: Work,
    machine: str | Hardware,
    *,
    compile: int = 4,
    seconds: float = 900.0,
    told: Callable[[str, float], None] | None = None,
    **options: Any,
) -> Plan:
    """The best layouts of a work on a machine; see `sharding.plan`.

    Args:
      work: what is trained.
      machine: as `sharding.plan.hardware` reads it.
      compile, seconds, told, **options: as there.

    Raises:
      FwError: as `variants`.
      sharding.ShardingError: a machine that does not exist; nothing that fits.
    """
    machine = hardware(machine) if isinstance(machine, str) else machine
    ways, source = variants(work)
    tokens = work.batch * (
        1 if source.head.task in ("image_classification", "segmentation") else work.length
    )
    found = plan_variants(
        ways, machine, tokens=tokens, flops=model_flops(work, source), compile=compile,
        seconds=seconds, told=told, **options,
    )  # fmt: skip
    kernels = work.precision != "f32" and source.head.task not in _IMAGES
    if machine.chip.platform == "gpu" and kernels and not has_cudnn():
        found.notes.append(
            "Attention is planned without cuDNN's kernel, which training takes where it is: "
            "pip install nvidia-cudnn-cu12, and plan again."
        )
    return found


AUTO = "auto"


def planned(recipe: Any) -> Any:
    """A recipe of `fw finetune` on the layout that its plan says; without one as it is.

    Args:
      recipe: a `fw.recipe.Finetune`; of its `plan`, the best layout's mesh, remat, accumulate,
        moments and adapters take the place of its own.

    Raises:
      FwError: a plan for another number of devices than there are, or no model to plan for.
      sharding.ShardingError: no plan.
    """
    if not recipe.plan:
        return recipe
    count = jax.device_count()
    if recipe.plan == AUTO:
        names = (field.name for field in dataclasses.fields(LoraOptions))
        own = LoraOptions(**{name: getattr(recipe, name) for name in names})
        work = Work(
            recipe.model or "all-MiniLM-L6-v2", recipe.batch, recipe.length, task=recipe.long_task,
            precision=recipe.precision, rules=recipe.rules, moments=(recipe.moments,),
            adapters=(own,),
        )  # fmt: skip
        best = plan_training(work, here(), compile=2, seconds=300.0).best
        mesh, choices, devices = best.candidate.mesh, best.candidate.variant.choices, count
    else:
        found = load(recipe.plan)
        mesh, choices, devices = found["mesh"], found["choices"], found["devices"]
    if devices != count:
        raise FwError(
            f"{recipe.plan}: a plan for {devices} devices, but there are {count}; plan for this "
            "machine, or --plan auto"
        )
    known = {key: choices[key] for key in ("remat", "moments") if key in choices}
    if "accumulate" in choices:
        known["accumulate"] = int(choices["accumulate"])
    if "lora" in choices:
        known |= adapters_of(choices["lora"])
    return replace(recipe, mesh=mesh, **known)


def adapters_of(text: str) -> dict[str, Any]:
    """The options of adapters as a plan and `fw plan --lora` have them.

    >>> adapters_of("16:nf4")
    {'lora': 16, 'lora_base': 'nf4'}
    """
    rank, _, base = text.partition(":")
    if not rank.isdecimal():
        raise FwError(f"lora {text!r}: expected a rank, as 16, or one with a format, as 16:nf4")
    return {"lora": int(rank), "lora_base": base}


def here() -> Hardware:
    """The machine that JAX sees.

    Raises:
      FwError: chips of a kind that is not known, or in a shape that no slice has.
    """
    devices = jax.devices()
    kind, first = devices[0].device_kind, devices[0]
    if first.platform == "cpu":
        return replace(hardware("cpu"), slices=len(devices))
    chip = next((c for c in CHIPS.values() if c.kind == kind), None)
    if chip is None:
        raise FwError(f"plan: {kind} is not among the chips of fw plan --list-hardware")
    if chip.dims:
        slices = len({getattr(d, "slice_index", 0) for d in devices})
        spans = [len({d.coords[axis] for d in devices}) for axis in range(chip.dims)]
        return hardware(f"{slices}*{chip.name}:{'x'.join(map(str, spans))}")
    each = len(jax.local_devices())
    return hardware(f"{chip.name}:{len(devices) // each}x{each}")


def read_prices(text: str) -> dict[str, float]:
    """Dollars a chip and hour by chip, as in "v5e=1.2,h100=2.5", or of a JSON file.

    >>> read_prices("v5e=1.2,h100=2.5")
    {'v5e': 1.2, 'h100': 2.5}
    """
    try:
        if text.endswith(".json"):
            found = json.loads(Path(text).read_text())
        else:
            found = dict(item.split("=") for item in text.split(",") if item)
        prices = {str(name): float(price) for name, price in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise FwError(f"prices {text!r}: expected chip=dollars,… or a JSON file: {error}") from None
    if any(not math.isfinite(price) or price < 0 for price in prices.values()):
        raise FwError(f"prices {text!r}: expected dollars from 0")
    return prices


def priced(machine: Hardware, prices: Mapping[str, float]) -> Hardware:
    """The machine at the price that a table has for its chip, else at its own."""
    if machine.chip.name not in prices:
        return machine
    return replace(machine, chip=replace(machine.chip, price=prices[machine.chip.name]))
