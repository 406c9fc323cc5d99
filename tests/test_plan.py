"""Plans: machines, links, counts, timetables, the search, and the compiler that decides."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fw
from fw.adaptation import LoraOptions
from fw.cli import main
from fw.errors import FwError
from fw.models.flash import has_cudnn
from fw.planning import build, model_flops, plan_training, planned, variants
from fw.recipe import Finetune
from fw.work import KNOWN, Work, source_of
from sharding import ShardingError, constrain, inspect, make_mesh, plan, rules
from sharding.mesh import AXES
from sharding.plan import CHIPS, hardware, legal, load, why
from sharding.plan.analytic import estimate, placed
from sharding.plan.compiler import Compiled, Refused, compile_all
from sharding.plan.hardware import GPUS
from sharding.plan.layouts import program_of
from sharding.plan.network import HOP, carried, seconds, way
from sharding.plan.plan import placed as placed_step
from sharding.plan.plan import surveyed
from sharding.plan.program import abstract_mesh, program
from sharding.plan.schedule import MEMORY_SHARE, schedule
from sharding.plan.search import candidates, kind, meshes, promising, shortlist
from sharding.plan.survey import survey
from sharding.program.collectives import collectives
from sharding.program.hlo import read

SHAPE = jax.ShapeDtypeStruct
NAMES = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}


def mlp_step(params, x):
    def loss(params):
        hidden = constrain(jax.nn.relu(x @ params["up"]), "batch", "mlp")
        return jnp.mean(constrain(hidden @ params["down"], "batch", "embed") ** 2)

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


def mlp_args(rows=4096, width=512, inner=2048):
    params = {"up": SHAPE((width, inner), "float32"), "down": SHAPE((inner, width), "float32")}
    return params, SHAPE((rows, width), "float32")


AXES_OF_MLP = (NAMES, ("batch", None))


# --- machines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHIPS)
def test_every_legal_shape_is_a_machine_and_others_are_told_apart(name):
    chip = CHIPS[name]
    for shape in legal(chip):
        machine = hardware(f"{name}:{'x'.join(map(str, shape))}")
        assert machine.chips == math.prod(shape)
        assert len({tuple(place) for place in machine.coords}) == machine.devices
        assert hardware(str(machine)) == machine
    for figure in ("memory", "flops", "hbm", "link", "dcn"):
        assert chip.sources[figure]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5e:3x5", "the nearest are 4x4"),
        ("v5p:4x4x6", "no slice of 4x4x6"),
        ("v5x:4x4", "did you mean"),
        ("v5e", "says no shape"),
        ("h100:4x7", "nodes x GPUs"),
        ("0*v5e:4x4", "one slice or more"),
        ("", "unknown"),
    ],
)
def test_what_is_no_machine(text, said):
    with pytest.raises(ShardingError, match=said):
        hardware(text)


# --- links ----------------------------------------------------------------------------------------


def test_a_ring_sends_both_ways_and_a_line_one():
    pod, part = hardware("v5e:16x16"), hardware("v5e:8x8")
    ring = way(pod, pod.coords[:16])  # a side of the pod, which closes
    line = way(part, part.coords[:8])
    link = pod.chip.link
    assert (ring.rate, line.rate) == (2 * link, link)
    gather = seconds("all-gather", ring, 10**6, 16 * 10**6)
    assert gather == pytest.approx(15 * 10**6 / (2 * link) + HOP * 8)
    assert seconds("all-reduce", ring, 16 * 10**6, 16 * 10**6) == pytest.approx(2 * gather)


def test_neighbours_that_are_far_apart_share_links():
    pod = hardware("v5e:16x16")
    side = pod.coords[:16]
    assert way(pod, side[::4]).rate == way(pod, side[:4]).rate / 4


def test_nodes_and_slices_are_slower_than_what_they_hold():
    cluster, slices = hardware(f"h100:2x{GPUS}"), hardware("2*v5e:4x4")
    inside = way(cluster, cluster.coords[:GPUS])
    across = way(cluster, cluster.coords)
    assert (inside.outside, across.outside) == (1, 2)
    time = [seconds("all-reduce", w, 10**8, 10**8) for w in (inside, across)]
    assert time[1] > 1.5 * time[0]
    assert way(slices, slices.coords).outside == 2


# --- counts ---------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    layers=st.integers(1, 4), rows=st.integers(1, 3), length=st.sampled_from([4, 8]),
    heads=st.integers(1, 3), inner=st.sampled_from([8, 12]),
)  # fmt: skip
def test_flops_of_a_decoder_are_those_of_its_formula(layers, rows, length, heads, inner):
    size, vocab = 4 * heads, 24
    config = {
        "vocab_size": vocab, "hidden_size": size, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": inner,
    }  # fmt: skip
    work = Work("llama-2-7b", rows, length, config=config, causal_half=False)
    kernels = layers * (4 * size * size + 3 * size * inner) + vocab * size
    attention = layers * 2 * length * size
    assert model_flops(work) == 6 * rows * length * (kernels + attention)


def test_what_is_computed_again_is_counted_and_what_is_kept_is_held():
    work = Work("llama-2-7b", 8, 128, config=_tiny(num_hidden_layers=4))
    source, mesh = source_of(work), abstract_mesh("data=1", hardware("v5e:1x1"))
    found = {
        name: survey(*build(work, source, {"remat": name})(mesh))
        for name in ("none", "dots", "layer")
    }
    flops = {name: one.dense for name, one in found.items()}
    kept = {name: sum(k.bytes for k in one.kept) for name, one in found.items()}
    assert flops["none"] == flops["dots"] < flops["layer"]
    assert kept["none"] > kept["dots"] > kept["layer"]
    assert found["layer"].batch == ("data", "fsdp", "expert")


def test_a_layout_holds_its_part_of_the_parameters():
    args = mlp_args()
    mesh = abstract_mesh("data=1", hardware("v5e:1x1"))
    made = placed_step(mlp_step, args, axes=AXES_OF_MLP, rules=rules())
    found, machine = survey(*made(mesh)), hardware("v5e:2x4")
    sizes = dict.fromkeys(AXES, 1)
    alone = estimate(found, sizes, machine)
    cut = estimate(found, sizes | {"fsdp": 4, "tensor": 2}, machine)
    assert alone.held["parameters"] == 2 * 512 * 2048 * 4 == 8 * cut.held["parameters"]
    assert cut.compute == pytest.approx(alone.compute / 8)
    assert set(cut.sent) == {"gather parameters", "scatter gradients", "sum products"}


# --- timetables -----------------------------------------------------------------------------------

_ALL = "channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true"
_DOTS = 'kind=kOutput, calls=%dots, backend_config={"estimated_cycles":'
_PART = "bf16[1024,1024]{1,0}"
_WHOLE = "bf16[4096,1024]{1,0}"
HLO = f"""HloModule step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%dots (p: bf16[1024,1024]) -> bf16[1024,1024] {{
  %p = {_PART} parameter(0)
  ROOT %dot = {_PART} dot(%p, %p), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

ENTRY %main (x: bf16[1024,1024]) -> bf16[4096,1024] {{
  %x = {_PART} parameter(0)
  %first = {_PART} fusion(%x), {_DOTS}"3000000"}}
  %start = ({_PART}, {_WHOLE}) all-gather-start(%x), {_ALL}, dimensions={{0}}
  %beside = {_PART} fusion(%first), {_DOTS}"CYCLES"}}
  %done = {_WHOLE} all-gather-done(%start)
  %y = f32[1024]{{0}} custom-call(), custom_call_target="AllocateBuffer"
  %late = f32[1024]{{0}} all-reduce(%y), {_ALL}, to_apply=%add
  ROOT %out = {_WHOLE} copy(%done)
}}
"""


_STARTED = f"({_PART}, {_WHOLE}) call-"
ON_SPARSE_CORES = (  # as a TPU's compiler has it, in a computation of its own
    HLO.replace(
        "ENTRY",
        f"""%sparse (q: bf16[1024,1024]) -> bf16[4096,1024] {{
  %q = {_PART} parameter(0)
  ROOT %gather = {_WHOLE} all-gather(%q), {_ALL}, dimensions={{0}}
}}, execution_thread="sparsecore"

ENTRY""",
    )
    .replace(
        f"({_PART}, {_WHOLE}) all-gather-start(%x), {_ALL}, dimensions={{0}}",
        f'{_STARTED}start(%x), async_execution_thread="sparsecore", to_apply=%sparse\n'
        f"  %going = {_STARTED}update(%start)",
    )
    .replace("all-gather-done(%start)", "call-done(%going)")
)


@pytest.mark.parametrize("program", [HLO, ON_SPARSE_CORES], ids=["plain", "sparse"])
@pytest.mark.parametrize("beside", [10, 10**9])
def test_what_travels_beside_computation_holds_it_up_only_where_it_is_late(beside, program):
    machine = hardware("v5e:2x2")
    text = read(program.replace("CYCLES", str(beside)))
    sent = collectives(text, np.arange(4).reshape(4, 1), ("fsdp",), lambda *_: "x", lambda *_: "y")
    found = schedule(text, sent, machine, machine.coords)
    gather, summed = (
        seconds(one.kind, way(machine, machine.coords), one.operand_bytes,
                one.result_bytes)
        for one in sent
    )  # fmt: skip
    compute = (3_000_000 + beside) * machine.chip.cycle
    wait = max(0.0, gather - beside * machine.chip.cycle)
    assert found.compute == pytest.approx(compute)
    assert found.exposed == pytest.approx(wait + summed)
    assert found.seconds == pytest.approx(compute + wait + summed)
    assert [e.kind for e in found.events] == ["compute", "send", "compute", "send"]


# --- the search -----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["v5e:2x4", "v5e:4x4", "v5p:2x2x2", "h100:1x8", "2*v5e:2x2"]), st.data())
def test_every_mesh_that_is_proposed_takes_all_devices_and_divides(text, data):
    machine = hardware(text)
    rows = data.draw(st.sampled_from([8, 12, 16, 48]))
    made = placed_step(mlp_step, mlp_args(rows, 96, 48), axes=AXES_OF_MLP, rules=rules())
    found = survey(*made(abstract_mesh("data=1", hardware("v5e:1x1"))))
    try:
        every = [*meshes(found, machine)]
    except ShardingError as error:
        assert "no mesh of" in str(error)
        return
    for sizes in every:
        assert math.prod(sizes.values()) == machine.devices
        assert rows % (sizes["data"] * sizes["fsdp"] * sizes["expert"]) == 0
        assert 96 % sizes["fsdp"] == 48 % sizes["tensor"] == 0
        assert sorted(placed(machine, tuple(sizes.values())).flat) == [*range(machine.devices)]


def test_what_is_impossible_is_one_sentence():
    few = mlp_args(rows=3, width=7, inner=5)
    with pytest.raises(ShardingError, match="an axis of 3 does not divide into 8 parts"):
        plan(mlp_step, few, "v5e:2x4", axes=AXES_OF_MLP, compile=0)
    huge = mlp_args(rows=64, width=2**17, inner=2**17)
    with pytest.raises(
        ShardingError, match=r"no layout fits v5e:2x2: the least is .* GiB a device"
    ):
        plan(mlp_step, huge, "v5e:2x2", axes=AXES_OF_MLP, compile=0)
    with pytest.raises(ShardingError, match="2 arguments, but axes of 1"):
        plan(mlp_step, mlp_args(), "v5e:2x2", axes=(NAMES,), compile=0)


def test_several_slices_are_cut_by_data_alone():
    found = plan(mlp_step, mlp_args(), "2*v5e:2x2", axes=AXES_OF_MLP, compile=0)
    assert all(one.candidate.mesh.startswith("dcn.data=2") for one in found.layouts)


# --- the compiler ---------------------------------------------------------------------------------


def test_a_plan_for_this_cpu_is_by_its_own_compiler(tmp_path):
    args = mlp_args(256, 64, 128)
    found = plan(
        mlp_step, args, "2*cpu", axes=AXES_OF_MLP, donate=0, compile=2, folder=tmp_path / "cache"
    )
    best = found.best
    assert best.compiled and found.lacking is None
    mesh = make_mesh(best.candidate.mesh, jax.devices()[:2])
    made, given = placed_step(mlp_step, args, axes=AXES_OF_MLP, rules=rules(), donate=0)(mesh)
    report = inspect(made.lower(*given).compile(), mesh=mesh)
    held = sum(p.device_bytes for p in report.parameters)
    assert sum(best.prediction.memory.kinds.values()) == held
    assert report.memory is not None
    assert best.prediction.memory.peak == report.memory.peak
    sent = sum(best.prediction.wire.values())
    assert sum(best.prediction.links.values()) == pytest.approx(sent)  # one link from each to each
    again = plan(
        mlp_step, args, "2*cpu", axes=AXES_OF_MLP, donate=0, compile=2, folder=tmp_path / "cache"
    )
    assert str(again.best) == str(best)  # and nothing was compiled: known by its content
    assert "compiler" in str(found) and "estimate" in str(found)

    found.save(tmp_path / "plan.json")
    assert load(tmp_path / "plan.json")["mesh"] == best.candidate.mesh
    for text in ("{}", "[1]", '{"version": 9, "best": {"mesh": "data=1", "choices": {}}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ShardingError, match=r"bad\.json"):
            load(tmp_path / "bad.json")

    other = next(m for m in ("fsdp=2", "tensor=2", "data=2") if m != best.candidate.mesh)
    assert "times the best's" in why(found, other, folder=tmp_path / "cache")
    with pytest.raises(ShardingError, match="no variant of the plan"):
        why(found, other, {"remat": "layer"})
    assert "does not divide" in why(
        plan(mlp_step, mlp_args(256, 64, 129), "2*cpu", axes=AXES_OF_MLP, compile=0), "tensor=2"
    )


def test_a_compiler_that_takes_too_long_is_stopped(tmp_path):
    machine = hardware("cpu")
    made, args = placed_step(mlp_step, mlp_args(), axes=AXES_OF_MLP, rules=rules())(
        abstract_mesh("data=1", machine)
    )
    [(_, found)] = compile_all(
        [program(made, args, machine, "data=1")], folder=tmp_path, limit=0.01
    )
    assert isinstance(found, Refused) and "more than" in found.reason
    assert not [*tmp_path.iterdir()]  # nothing half made stays


@pytest.mark.parametrize(
    ("fn", "least", "most"),
    [
        (lambda table, ids: table[ids], 0.0, 0.05),
        (lambda table, ids: table[ids] * table[ids + 1], 0.0, 0.05),
        (lambda table, ids: table.at[ids].add(1.0, unique_indices=True), 0.0, 3.1),
        (lambda table, ids: (table[ids].sum() + table).sum(0), 0.9, 3.1),  # and reads all of it
    ],
)
def test_rows_of_a_table_count_and_not_the_table(fn, least, most):
    machine, table = hardware("cpu"), SHAPE((50_000, 64), "float32")
    text = jax.jit(fn).lower(table, SHAPE((512,), "int32")).compile().as_text() or ""
    took = schedule(read(text), (), machine, machine.coords).seconds
    whole = 4 * 64 * 50_000 / (MEMORY_SHARE * machine.chip.hbm)
    assert least * whole < took < most * whole


def test_every_axis_of_a_torus_carries_its_own_share():
    pod = hardware("v5p:4x4x8")
    links, outside = carried("all-to-all", way(pod, pod.coords), 10**6, 10**6)
    assert outside == 0 and links["x"] == links["y"] == links["z"] / 2
    links, _ = carried("all-gather", way(pod, pod.coords), 10**6, 128 * 10**6)
    assert len({*links.values()}) == 1 and 6 * links["x"] == 127 * 10**6  # both ways of each axis


@pytest.mark.slow
def test_no_tpu_casts_a_whole_table(tmp_path):
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'fw[plan]'")
    machine, table = hardware("v5e:2x2"), {"columns": ("user", "item"), "rows": (400_000, 300)}
    work = Work("dlrm", 4096, config=table | {"size": 128}, accumulate=(1,))
    best = plan_training(work, machine, compile=1, folder=tmp_path).best
    [(_, made)] = compile_all([program_of(best.candidate, machine)], folder=tmp_path)
    assert isinstance(made, Compiled)
    text = (made.folder / "program.hlo").read_text()
    rows = {int(n) for n in re.findall(r"bf16\[(\d+),128\]", text)}
    assert rows and max(rows) < 400_000 // 4


def test_what_went_wrong_is_tried_again(tmp_path):
    machine = hardware("cpu")
    made, args = placed_step(mlp_step, mlp_args(64, 32, 64), axes=AXES_OF_MLP, rules=rules())(
        abstract_mesh("data=1", machine)
    )
    bad = program(made, args, machine, "data=1", {"no_such_option": True})
    for _ in range(2):
        [(_, found)] = compile_all([bad], folder=tmp_path)
        assert isinstance(found, Refused) and "no_such_option" in found.reason
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1",
                                     "2*v5e:2x2", "h100:1x4", "h200:1x2", "a100:1x4", "b200:1x4",
                                     "cpu"])  # fmt: skip
@pytest.mark.parametrize(
    "family",
    [
        *("llama", "mixtral", "bert", "distilbert", "modernbert", "vit", "resnet"),
        *("efficientnet", "unet", "mlp", "ft_transformer", "dlrm", "two_tower"),
    ],
)
def test_every_family_compiles_for_every_machine(machine, family, tmp_path):
    target = hardware(machine)
    needed = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}.get(target.chip.platform)
    if needed is not None and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install 'fw[plan]'")
    model, config = family, NEW.get(family, {})
    if not config:
        model = str(tmp_path / "config.json")
        Path(model).write_text(json.dumps(CONFIGS[family]))
    work = Work(
        model, 16 * target.devices, 128, size=64 if family == "unet" else 0, config=config,
        remat=(None,), accumulate=(1,),
    )  # fmt: skip
    found = plan_training(work, target, compile=1, folder=tmp_path / "cache")
    best = found.best
    assert best.compiled, best.refused
    assert 0 < best.prediction.seconds < 60
    assert 0 < best.prediction.memory.peak <= target.chip.memory
    if target.chip.platform != "cpu":
        assert 0 < best.prediction.mfu < 1


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["h100:1x4", "b200:1x4"])
def test_attention_is_planned_by_cudnns_kernels(machine, tmp_path):
    if not (find_spec("jax_cuda12_plugin") and has_cudnn()):
        pytest.skip("no cuDNN: pip install 'fw[plan]' nvidia-cudnn-cu12")
    work = Work("llama-2-7b", 8, 1024, config=_tiny(), remat=(None,), accumulate=(1,))
    found = plan_training(work, machine, compile=2, folder=tmp_path / "cache")
    best = found.best
    assert best.compiled and not found.notes and best.table is not None
    inside = [e for event in best.table.events for e in (event, *event.inside)]
    kernels = {e.name for e in inside if e.kind == "kernel"}
    assert any("fwd" in name for name in kernels) and any("bwd" in name for name in kernels)


# --- models, and the command ----------------------------------------------------------------------


def _tiny(**more):
    sizes = {
        "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 512, "head_dim": 128,
    }  # fmt: skip
    return sizes | more


_ENCODER = {
    "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 512, "architectures": [],
}  # fmt: skip
CONFIGS = {
    "llama": {**KNOWN["llama-2-7b"], **_tiny()},
    "mixtral": {**KNOWN["mixtral-8x7b"], **_tiny(num_local_experts=4)},
    "bert": {**_ENCODER, "model_type": "bert", "max_position_embeddings": 128},
    "modernbert": {**_ENCODER, "model_type": "modernbert", "max_position_embeddings": 128},
    "vit": {
        "model_type": "vit", "image_size": 64, "patch_size": 16, "hidden_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256,
    },
    "resnet": {
        "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
        "layer_type": "basic",
    },
    "distilbert": {
        "model_type": "distilbert", "vocab_size": 512, "dim": 256, "n_layers": 2, "n_heads": 4,
        "hidden_dim": 512, "max_position_embeddings": 128,
    },
    "efficientnet": {
        "model_type": "efficientnet_lite", "image_size": 64, "width": 0.25, "depth": 0.2,
    },
}  # fmt: skip
NEW = {
    "unet": {"width": 8, "depth": 2},
    "mlp": {"numbers": 5, "categories": (7, 11)},
    "ft_transformer": {"numbers": 5, "categories": (7, 11)},
    "dlrm": {"columns": ("user", "item"), "rows": (200_000, 300), "numbers": ("x",), "size": 32},
    "two_tower": {
        "user_columns": ("user",), "user_rows": (200_000,), "item_columns": ("item",),
        "item_rows": (30_000,), "size": 32, "hidden": (64,),
    },
}  # fmt: skip


def test_variants_are_what_no_loss_depends_on(tmp_path):
    ways, _ = variants(Work("llama-2-7b", 8, 16, config=_tiny(), moments=("float32", "8bit")))
    choices = [tuple(v.choices.values()) for v in ways]
    assert len(choices) == len({*choices}) == 3 * 4 * 2
    (tmp_path / "config.json").write_text('{"model_type": "unet", "width": 8, "depth": 2}')
    with pytest.raises(FwError, match="has no layers to compute again"):
        variants(Work(str(tmp_path), 8, remat=("layer",)))
    with pytest.raises(FwError, match="batch is 0"):
        Work("llama-2-7b", 0)


def test_moments_in_a_byte_need_less():
    work = Work("llama-2-7b", 256, 512, moments=("float32", "8bit"), remat=("layer",))
    found = candidates(
        [
            (v, survey(*v.build(abstract_mesh("data=1", hardware("v5e:1x1")))))
            for v in variants(work)[0]
        ],
        hardware("v5e:16x16"),
    )
    held = {c.variant.choices["moments"]: c.estimate.held["optimizer"] for c in found[::-1]
            if c.mesh == "fsdp=256" and c.variant.choices["accumulate"] == "1"}  # fmt: skip
    assert held["8bit"] < 0.3 * held["float32"]


def _surveyed(work, machine):
    return surveyed(variants(work)[0], machine, lambda text, left: None)


def test_adapters_are_planned_for(tmp_path):
    ways = (LoraOptions(), LoraOptions(lora=4), LoraOptions(lora=4, lora_base="nf4"))
    work = Work("llama-2-7b", 16, 64, config=_tiny(), adapters=ways, remat=(None,), accumulate=(1,))
    machine, ones = hardware("2*cpu"), dict.fromkeys(AXES, 1)
    found = _surveyed(work, machine)
    held = {v.choices["lora"]: estimate(one, ones, machine).held for v, one in found}
    assert [*held] == ["0", "4", "4:nf4"]
    assert held["0"]["frozen"] == 0 and held["4"]["parameters"] < 0.05 * held["0"]["parameters"]
    assert held["4"]["frozen"] == pytest.approx(held["0"]["parameters"], rel=1e-3)
    assert held["4:nf4"]["frozen"] < 0.2 * held["4"]["frozen"]
    (whole, _), (thin, one), _ = found
    assert whole.flops is None and thin.flops is not None
    assert 2 / 3 <= thin.flops / model_flops(work) < 0.75  # attention has its whole derivative
    assert not any("pipe" in c.mesh for c in candidates([(thin, one)], machine))
    best = plan_training(
        replace(work, adapters=ways[2:]), machine, compile=1, folder=tmp_path / "cache"
    ).best
    assert best.compiled and best.prediction.memory.kinds["frozen"] > 0


def test_products_of_experts_count_once_for_each_that_is_chosen():
    sizes = _tiny(num_local_experts=4, num_experts_per_tok=2)
    work = Work("mixtral-8x7b", 4, 64, config=sizes, causal_half=False, remat=(None,))
    wide = replace(work, config={**sizes, "intermediate_size": 2 * sizes["intermediate_size"]})
    experts = (model_flops(wide) - model_flops(work)) / 2
    tokens, layer = 4 * 64, 3 * sizes["hidden_size"] * sizes["intermediate_size"]
    assert experts == 6 * tokens * sizes["num_hidden_layers"] * layer
    # On TPUs by products of uneven groups, which need no padding; once more on the way back.
    counted = _surveyed(work, hardware("v5e:2x2"))[0][1]
    again = model_flops(work) + 2 * experts / 3
    assert counted.dense + counted.batched == pytest.approx(again, rel=0.03)


def test_what_the_compiler_said_moves_all_of_a_kind():
    work = Work("llama-3.1-8b", 256, 4096, remat=("dots",), accumulate=(1,))
    machine = hardware("v5p:4x4x4")
    memory = machine.chip.memory
    every = shortlist(candidates(_surveyed(work, machine), machine), 40, memory)
    [first] = promising(every, 1, {}, memory)
    assert not any(kind(first)[:4])  # nothing but rows is cut
    two = promising(every, 2, {kind(first): (1.2, 1.0)}, memory)
    assert kind(two[0]) != kind(two[1])
    known = {kind(one): (1.2 if kind(one) == kind(first) else 9.0, 1.0) for one in every}
    assert kind(promising(every, 1, known, memory)[0]) == kind(first)
    known[kind(first)] = 1.2, 1e3  # it does not fit after all
    assert kind(promising(every, 1, known, memory)[0]) != kind(first)


def test_fw_plan_says_what_it_lacks_and_writes(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["llama"]))
    command = ["plan", "--model", str(path), "--batch", "64", "--length", "128", "--compile", "0"]
    assert main([*command, "--hardware", "v5e:4x4", "--out", str(tmp_path / "out"),
                 "--prices", "v5e=2"]) == 0  # fmt: skip
    told = capsys.readouterr().out
    assert "layouts were estimated for v5e:4x4" in told
    saved = json.loads((tmp_path / "out/plan.json").read_text())
    assert saved["devices"] == 16 and saved["best"]["works"]
    page = (tmp_path / "out/plan.html").read_text()
    for heading in ("Memory of a device", "Where parameters lie", "Speed and memory"):
        assert heading in page
    assert main(["plan", "--list-hardware"]) == 0
    listed = capsys.readouterr().out
    for name, chip in CHIPS.items():
        [sources] = [line for line in listed.splitlines() if line.startswith(f"{name}: ")]
        assert f"\n{name} " in listed and all(said in sources for said in chip.sources.values())
    for wrong, said in (
        (["--hardware", "v5e:3x5"], "the nearest are"),
        (["--hardware", "v5e:4x4", "--batch", "-1"], "batch is -1"),
        (["--hardware", "v5e:4x4", "--remat", "all"], "remat 'all'"),
        (["--hardware", "v5e:4x4", "--prices", "v5e"], "prices 'v5e'"),
    ):
        assert main([*command, *wrong]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in error and error.startswith("fw: ")


def test_training_takes_the_plan(tmp_path):
    saved = {
        "version": 1, "hardware": "8*cpu", "devices": jax.device_count(), "layouts": [],
        "best": {"mesh": "data=4,tensor=2", "choices": {"remat": "dots", "accumulate": "2",
                                                        "moments": "8bit", "lora": "8:int8"}},
    }  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(saved))
    recipe = planned(Finetune(data="x.csv", plan=str(path), batch=8))
    assert (recipe.mesh, recipe.remat, recipe.accumulate, recipe.moments) == (
        "data=4,tensor=2", "dots", 2, "8bit",
    )  # fmt: skip
    assert (recipe.lora, recipe.lora_base) == (8, "int8")
    own = Finetune(data="x.csv", plan=str(path), batch=8, length=32)
    about = {"batch": 8, "length": 32, "precision": "bf16", "task": "ner"}
    path.write_text(json.dumps(saved | {"about": about}))
    assert planned(own).mesh == "data=4,tensor=2"
    for wrong, said in (
        ({"devices": 3}, "a plan for 3 devices"),
        ({"about": about | {"length": 512}}, "a plan for length 512, but this run has 32"),
        ({"about": about | {"precision": "f32"}}, "give --precision f32, or plan again"),
        ({"about": about | {"task": "rank"}}, "give --task rank"),
    ):
        path.write_text(json.dumps(saved | wrong))
        with pytest.raises(FwError, match=said):
            planned(own)
    path.write_text(json.dumps(saved | {"about": None}))
    with pytest.raises(ShardingError, match="cannot be read as a plan"):
        planned(own)


def test_a_plan_needs_no_devices_and_no_accelerator():
    code = (
        "from sharding.plan import hardware; from fw.planning import Work, plan_training;"
        "found = plan_training(Work('llama-3.1-8b', 256, 2048), 'v5p:4x4x4', compile=0);"
        "print(found.best)"
    )
    root = str(Path(fw.__file__).parents[1])
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": root, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert "remat=" in told.stdout


def test_compiled_is_what_was_written(tmp_path):
    machine = hardware("cpu")
    made, args = placed_step(mlp_step, mlp_args(64, 32, 64), axes=AXES_OF_MLP, rules=rules())(
        abstract_mesh("data=1", machine)
    )
    one = program(made, args, machine, "data=1")
    [(_, found)] = compile_all([one], folder=tmp_path)
    assert isinstance(found, Compiled)
    assert [p["path"] for p in found.parameters] == [*one.names]
    assert found.text.devices == 1 and found.collectives == ()


def test_a_program_is_known_by_what_it_does_and_not_by_its_lines():
    fns = [
        lambda x: x + 1,
        lambda x: x + 1,
        lambda x: x + 2,
        jax.named_scope("sees_0.5")(lambda x: x + 1),
    ]
    machine = hardware("cpu")
    x = SHAPE((4,), "float32", sharding=NamedSharding(abstract_mesh("data=1", machine), P()))
    keys = [program(fn, (x,), machine, "data=1").key for fn in fns]
    assert keys[0] == keys[1] and len({*keys}) == 3
