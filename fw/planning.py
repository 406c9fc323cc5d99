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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from compress.arrays import is_compressed
from compress.transform import named_leaves
from fw.adaptation import LoraOptions, adapt, check_images
from fw.errors import FwError
from fw.hub.folder import Loaded
from fw.model import Model
from fw.models.flash import has_cudnn
from fw.models.stack_layout import default_microbatches, scans
from fw.optimizer import AdamW, optimizer
from fw.recipe import NEW
from fw.step import abstract_state, make_step, stateful
from fw.table_optimizer import TableOptions, at, row_optimizer, with_tables
from fw.tasks import make_task
from fw.work import IMAGES, OF_TEXTS, WHOLE, Source, Work, source_of, spelt
from sharding import Rules, shardings
from sharding import rules as make_rules
from sharding.layout import fit
from sharding.parallel.pipeline import PIPE
from sharding.plan import CHIPS, Hardware, Plan, Variant, hardware, load, plan_variants
from sharding.rules import BATCH

_SHARES = (1, 2, 4, 8, 16)  # microbatches that are tried
_STEPS = 1000  # of a schedule; no step's cost depends on it


def build(
    work: Work,
    source: Source,
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
    config = AdamW(moments=choices.get("moments", "float32"))
    rows = row_optimizer(TableOptions(work.table_optimizer), config, _STEPS)

    def made(mesh: Any) -> tuple[Callable[..., Any], Sequence[Any]]:
        remat = choices.get("remat", "none")
        how = {
            "remat": None if remat == "none" else remat,
            "microbatches": default_microbatches(mesh),
            "scan": source.family.stacked or scans(mesh),
        }
        model = source.model(**how)
        frozen = []
        if adapters.lora:
            model, *frozen = _adapted(model, adapters, mesh, table)
        tx = with_tables(optimizer(config, _STEPS), model, rows)
        step = make_step(
            model, task.loss, tx, mesh=mesh, rules=table, precision=work.precision,
            accumulate=int(choices.get("accumulate", "1")),
        )  # fmt: skip
        batch = {}
        for name, x in source.batch(work).items():
            names = (BATCH, *[None] * (len(x.shape) - 1))
            where = fit(names, x.shape, mesh, table, activation=True, path=f"batch/{name}")
            batch[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
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


def variants(work: Work, source: Source | None = None) -> tuple[list[Variant], Source]:
    """The ways to write a work's step.

    Args:
      work: what is trained.
      source: its model, where it was read.

    Raises:
      FwError: as `source_of`; a remat that the model has not.
    """
    source = source or source_of(work)
    if any(one.lora for one in work.adapters) and (work.model in NEW or source.model().tables):
        raise FwError(f"lora is for pretrained models; {work.model} is trained whole")
    if any(one.lora for one in work.adapters) and source.head.task in IMAGES:
        check_images(work.precision)
    has = "remat" in source.fields
    known: tuple[str | None, ...] = (None, "dots", "layer") if has else (None,)
    remats = work.remat if work.remat is not None else known
    if not has and remats != (None,):
        raise FwError(f"remat: {work.model} has no layers to compute again")
    shares = work.accumulate or (1,)
    if work.accumulate is None and not _whole(source):
        shares = tuple(n for n in _SHARES if work.batch % n == 0)
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


def _whole(source: Source) -> bool:
    """Whether a loss is of a batch as it is: rows are contrasted with each other, or normalised."""
    return source.head.task == "retrieval" or stateful(source.model())


def model_flops(work: Work, source: Source | None = None, products: int = 3) -> float:
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
    model, batch = source.model(), source.batch(work)
    loss = make_task(source.head.task, source.head.labels).loss
    variables = jax.eval_shape(model.init, jax.random.key(0))
    counted = survey(lambda v, b: loss(model.apply(v, b)[0], b), (variables, batch))
    half = 0.5 if work.causal_half and source.head.task == "causal_lm" else 1.0
    return products * counted.dense + 3 * half * counted.batched


def plan_training(
    work: Work,
    machine: str | Hardware,
    *,
    source: Source | None = None,
    **options: Any,
) -> Plan:
    """The best layouts of a work on a machine; see `sharding.plan`.

    Args:
      work: what is trained.
      machine: as `sharding.plan.hardware` reads it.
      source: its model, where it was read.
      **options: `compile`, `seconds`, `told` and others, as there.

    Raises:
      FwError: as `variants`.
      sharding.ShardingError: a machine that does not exist; nothing that fits.
    """
    machine = hardware(machine) if isinstance(machine, str) else machine
    ways, source = variants(work, source)
    texts = source.head.task in OF_TEXTS
    found = plan_variants(
        ways, machine, tokens=work.batch * (work.length if texts else 1),
        flops=model_flops(work, source), **options,
    )  # fmt: skip
    found.unit = "tokens" if texts else "rows"
    own = ("batch", "precision", "rules", *(["length"] if texts else []))
    found.about = {"model": work.model, "task": spelt([source.head.task])} | {
        name: getattr(work, name) for name in own
    }
    found.notes += _notes(work, source, machine)
    return found


def _notes(work: Work, source: Source, machine: Hardware) -> Iterator[str]:
    """What whoever reads a plan's figures should know."""
    kernels = work.precision != "f32" and source.head.task in OF_TEXTS
    if machine.chip.platform == "gpu" and kernels and not has_cudnn():
        yield (
            "Attention is planned without cuDNN's kernel, which training takes where it is: "
            "pip install nvidia-cudnn-cu12, and plan again."
        )
    if machine.chip.platform == "tpu":
        model = source.model()
        params = jax.eval_shape(model.init, jax.random.key(0))["params"]
        large = [path for path in model.tables if any(at(model.axes["params"], path))]
        sizes = {at(params, path).shape[1] for path in large}
        if odd := sorted(size for size in sizes if size % LANES):
            yield (
                f"A TPU copies tables of {odd[0]} columns whole, there and back, in every step: "
                f"choose a multiple of {LANES}."
            )


LANES = 128
"""Columns of a TPU's tiles (scripts/bench/LOG.md, 2026-11-27)."""

AUTO = "auto"


def planned(recipe: Any) -> Any:
    """A recipe of `fw finetune` on the layout that its plan's file says; without one as it is.

    Args:
      recipe: a `fw.recipe.Finetune`; of its `plan`, the best layout's mesh, remat, accumulate,
        moments and adapters take the place of its own.

    Raises:
      FwError: a plan for another number of devices than there are, or for another step.
      sharding.ShardingError: no plan.
    """
    if not recipe.plan or recipe.plan == AUTO:
        return recipe
    found = load(recipe.plan)
    count = jax.device_count()
    if found["devices"] != count:
        raise FwError(
            f"{recipe.plan}: a plan for {found['devices']} devices, but there are {count}; plan "
            "for this machine, or --plan auto"
        )
    own = {name: getattr(recipe, name) for name in ("batch", "length", "rules", "precision")}
    for name, mine in (own | {"task": recipe.task}).items():
        if (theirs := found["about"].get(name, mine)) != mine:
            raise FwError(
                f"{recipe.plan}: a plan for {name} {theirs}, but this run has {mine}; give "
                f"--{name} {theirs}, or plan again"
            )
    return _on(recipe, found["mesh"], found["choices"])


def planned_here(
    recipe: Any,
    config: Any,
    labels: Sequence[str],
    row: Mapping[str, Any],
    accumulate: int | None = None,
) -> Any:
    """A recipe of `fw finetune` on the best layout of the devices that there are.

    Args:
      recipe: a `fw.recipe.Finetune`.
      config: of its model, if it is a new one; else None.
      labels: of its data.
      row: of its batches, arrays [1, ...] by name.
      accumulate: microbatches of the run that is resumed; None where they may be chosen.

    Raises:
      FwError: a model that is not known, or devices.
      sharding.ShardingError: nothing fits.
    """
    names = (field.name for field in dataclasses.fields(LoraOptions))
    own = LoraOptions(**{name: getattr(recipe, name) for name in names})
    work = Work(
        recipe.model, recipe.batch, recipe.length, task=recipe.long_task,
        classes=len(labels) or Work.classes, precision=recipe.precision, rules=recipe.rules,
        moments=(recipe.moments,), table_optimizer=recipe.table_optimizer, adapters=(own,),
        config={} if config is None else dataclasses.asdict(config),
        accumulate=None if accumulate is None else (accumulate,),
    )  # fmt: skip
    shapes = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in row.items()}
    source = replace(source_of(work), row=shapes)
    best = plan_training(work, here(), source=source, compile=2, seconds=300.0).best
    return _on(recipe, best.candidate.mesh, best.candidate.variant.choices)


def _on(recipe: Any, mesh: str, choices: Mapping[str, str]) -> Any:
    """A recipe on a mesh, with what was chosen."""
    known: dict[str, Any] = {k: choices[k] for k in ("remat", "moments") if k in choices}
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
