"""Every chip that can be planned for: what it computes, holds and sends, and who says so.

One table, `CHIPS`; whoever has better figures changes them here. Rates are peaks of the maker but
where `sources` says "measured". `hardware` makes machines of chips, `network` times what they send.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

GiB = 2**30

_BOOK = "jax-ml.github.io/scaling-book/tpus, measured"
_COMPILER = "what libtpu 0.0.50 calls available for a program"
_PRICE = "cloud.google.com/tpu/pricing: on demand, us; yours may differ"


def _tpu(page: str, **others: str) -> Mapping[str, str]:
    docs = f"docs.cloud.google.com/tpu/docs/{page}"
    found = {
        "memory": _COMPILER, "flops": docs, "hbm": docs, "link": _BOOK, "counted": "libtpu 0.0.50",
        "dcn": docs, "price": _PRICE,
    }  # fmt: skip
    return MappingProxyType(found | others)


@dataclass(frozen=True, eq=False)
class Chip:
    """One device as JAX sees it: a chip, but for tpu7x, of whose chips each is two devices.

    Attributes:
        name: as users write it.
        kind: JAX's `device_kind`.
        platform: "tpu", "gpu" or "cpu".
        memory: bytes that a program can have.
        flops: products and sums a second, by dtype of the operands.
        hbm: bytes a second that its memory reads or writes.
        link: bytes a second that one link sends, one way: of a TPU's torus to a neighbour; of a
            GPU to all others of its machine together.
        dcn: bytes a second that it sends out of its slice or machine, its share of the host's.
        counted: products and sums that the compiler counts for each of its cycles in a large
            product, 8192 x 8192 x 8192 in bfloat16; 0 where it counts no cycles.
        cores: compute cores that work as one device.
        dims: axes of the torus; 0 where there is none.
        together: devices of a chip.
        most: chips of the largest slice.
        price: dollars a chip and hour; None where no list price is known here.
        reached: of a TPU's peak rate, what a large product reaches. By this a counted cycle has its
            seconds: the compilers of the generations count the same product at 70 (v6e) to 93 %
            (v4) of the peak.
        hides: of computation, what can hide gathers and scatters of parameters, as its compiler
            schedules them: of TPUs only a v5e's does.
        busy: the share of its peak that a kernel of attention is taken to reach with what it does
            not skip; the compiler says nothing of it.
        target: what XLA's compiler for GPUs asks of a GPU.
        sources: of each figure.
    """

    name: str
    kind: str
    platform: str
    memory: int
    flops: Mapping[str, float]
    hbm: float
    link: float
    dcn: float
    counted: int = 0
    cores: int = 1
    dims: int = 0
    together: int = 1
    most: int = 0
    price: float | None = None
    reached: float = 0.95
    hides: float = 0.9
    busy: float = 0.5
    target: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def cycle(self) -> float:
        """Seconds of one of the compiler's cycles; 0 where it counts none."""
        return self.counted / (self.reached * self.flops["bfloat16"]) if self.counted else 0.0


GPU_SHARE = 0.92
"""Of a GPU's memory, what a program can have where `XLA_PYTHON_CLIENT_MEM_FRACTION` says so; JAX
leaves a quarter to others by default."""

_HOPPER = {"bfloat16": 989.4e12, "float32": 494.7e12, "int8": 1979e12, "float8_e4m3fn": 1979e12}
_HOPPER_UNITS = {
    "cores": 132, "lanes": 128, "l2": 52_428_800, "clock": 1.98, "major": 9, "shared": 233_472,
    "block": 232_448,
}  # fmt: skip


def _gpu(
    name: str, kind: str, total: int, flops: Mapping[str, float], hbm: float,
    units: Mapping[str, float], *, link: float = 450e9, dcn: float = 50e9,
) -> Chip:  # fmt: skip
    """A GPU: products of float32 as TF32, links as NVLink, `dcn` a network card's."""
    sources = dict.fromkeys(("flops", "hbm", "link"), f"data sheet of the {name.upper()} SXM")
    sources |= {"memory": f"{GPU_SHARE} of all", "dcn": "data sheet of the DGX"}
    return Chip(
        name, kind, "gpu", int(GPU_SHARE * total), flops, hbm, link, dcn,
        target={**units, "memory": total}, sources=sources,
    )  # fmt: skip


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip(
                "v4", "TPU v4", "tpu", int(30.75 * GiB), {"bfloat16": 275e12, "int8": 275e12},
                hbm=1228e9, link=45e9, dcn=3.1e9, counted=243_057, cores=2, dims=3,
                most=4096, price=3.22, hides=0.0, sources=_tpu("v4"),
            ),
            Chip(
                "v5e", "TPU v5 lite", "tpu", int(15.75 * GiB),
                {"bfloat16": 197e12, "int8": 393e12},
                hbm=819e9, link=45e9, dcn=3.1e9, counted=115_044, dims=2, most=256, price=1.20,
                sources=_tpu("v5e"),
            ),
            Chip(
                "v5p", "TPU v5", "tpu", int(95.73 * GiB), {"bfloat16": 459e12, "int8": 918e12},
                hbm=2765e9, link=90e9, dcn=6.25e9, counted=236_349, cores=2, dims=3,
                most=6144, price=4.20, hides=0.0, sources=_tpu("v5p"),
            ),
            Chip(
                "v6e", "TPU v6 lite", "tpu", int(31.24 * GiB),
                {"bfloat16": 918e12, "int8": 1836e12},
                hbm=1638e9, link=90e9, dcn=12.5e9, counted=369_231, dims=2, most=256, price=2.70,
                # At 0.95, as all others, three published runs come out 10 to 12 % too fast.
                reached=0.88, hides=0.0, sources=_tpu("v6e"),
            ),
            Chip(
                "tpu7x", "TPU7x", "tpu", int(94.74 * GiB),
                {"bfloat16": 1153.5e12, "float8_e4m3fn": 2307e12},
                hbm=3690e9, link=90e9, dcn=6.25e9, counted=422_142, dims=3, together=2,
                most=9216, price=12.0, hides=0.0,
                sources=_tpu("tpu7x", flops="docs.cloud.google.com/tpu/docs/tpu7x, half a chip",
                             link="docs.cloud.google.com/tpu/docs/tpu7x, nine tenths"),
            ),
            _gpu("h100", "NVIDIA H100 80GB HBM3", 84_942_979_072, _HOPPER, 3352e9, _HOPPER_UNITS),
            _gpu("h200", "NVIDIA H200", 151_397_597_184, _HOPPER, 4800e9, _HOPPER_UNITS),
            _gpu(
                "a100", "NVIDIA A100-SXM4-80GB", 85_100_068_864,
                {"bfloat16": 312e12, "float32": 156e12, "int8": 624e12}, 2039e9,
                {"cores": 108, "lanes": 64, "l2": 41_943_040, "clock": 1.41, "major": 8,
                 "shared": 167_936, "block": 166_912},
                link=300e9, dcn=25e9,
            ),
            _gpu(
                "b200", "NVIDIA B200", 191_514_411_008,
                {"bfloat16": 2250e12, "float32": 1100e12, "int8": 4500e12,
                 "float8_e4m3fn": 4500e12}, 7672e9,
                {"cores": 148, "lanes": 128, "l2": 132_644_864, "clock": 1.965, "major": 10,
                 "shared": 233_472, "block": 232_448},
                link=900e9,
            ),
        )
    }
)  # fmt: skip
"""By name."""
