"""What a step will take: seconds, memory, money, each number with who says so.

Two estimates that know nothing of each other stand side by side: the timetable of the compiled
program (`schedule`), and a roofline of the function's own products (`analytic`). Where they differ
by more than `GAP`, the prediction says so.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sharding.plan.compiler import Compiled
from sharding.plan.hardware import Hardware
from sharding.plan.schedule import MEMORY_SHARE, PRODUCT_SHARE, Schedule, schedule
from sharding.plan.survey import NONE, kind_of

GAP = 0.35
"""Of the longer of two estimates, the difference from which on they are said to disagree."""


@dataclass(frozen=True)
class Held:
    """Bytes that one device holds.

    Attributes:
        kinds: of what goes in, by kind: parameters, frozen, optimizer, batch.
        activations: that are kept from the forward to the backward pass, and all else for a time.
        peak: the most at once.
        capacity: of the device.
        largest: the largest arrays that go in, as (path, bytes).
    """

    kinds: Mapping[str, int]
    activations: int
    peak: int
    capacity: int
    largest: tuple[tuple[str, int], ...] = ()

    @property
    def over(self) -> int:
        """Bytes that are missing; 0 or less where it fits."""
        return self.peak - self.capacity


@dataclass(frozen=True)
class Prediction:
    """What one step of one layout takes.

    Attributes:
        seconds: of a step.
        tokens: of a step, of all devices; 0 where a step has none.
        flops: that the model needs in a step, all devices together, nothing computed twice.
        machine: what it runs on.
        memory: of one device.
        compute: seconds of arithmetic, kernels included.
        exposed: seconds in which a device only waits for others.
        sent: seconds of collectives, by kind and axes; `waited`, of these exposed.
        wire: bytes that a device sends in a step, by mesh axes.
        links: of these, what each link carries that it sends through, by the links' name: "x", "y"
            and "z" of a torus, "die", "node", and "network" between slices or nodes.
        roofline: seconds by the other estimate.
        sources: who says each.
    """

    seconds: float
    tokens: int
    flops: float
    machine: Hardware
    memory: Held
    compute: float
    exposed: float
    sent: Mapping[str, float]
    waited: Mapping[str, float]
    wire: Mapping[str, int]
    links: Mapping[str, float]
    roofline: float
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        chip = self.machine.chip
        peak = chip.flops["bfloat16"] * self.machine.devices
        return self.flops / self.seconds / peak if self.seconds else 0.0

    @property
    def rate(self) -> float:
        """Tokens a second, of the whole machine."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def dollars(self) -> float | None:
        """Of a million tokens; None without a price, or tokens."""
        price = self.machine.chip.price
        if price is None or not self.tokens:
            return None
        return price * self.machine.chips * self.seconds / 3600 / self.tokens * 1e6

    @property
    def fits(self) -> bool:
        """Whether a device can hold it."""
        return self.memory.over <= 0

    @property
    def disagree(self) -> bool:
        """Whether the two estimates are far apart."""
        return abs(self.seconds - self.roofline) > GAP * max(self.seconds, self.roofline)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, derived ones with it."""
        found = {k: getattr(self, k) for k in ("seconds", "tokens", "flops", "compute", "exposed")}
        found |= {k: getattr(self, k) for k in ("mfu", "rate", "dollars", "fits", "roofline")}
        found |= {k: dict(getattr(self, k)) for k in ("sent", "waited", "wire", "links", "sources")}
        return found | {"memory": asdict(self.memory), "disagree": self.disagree}


def predict(
    compiled: Compiled, machine: Hardware, *, tokens: int, flops: float, roofline: float,
    kinds: Mapping[int, str] = NONE,
) -> tuple[Prediction, Schedule]:  # fmt: skip
    """Of a compiled program.

    Args:
        compiled: the program.
        machine: what it was compiled for.
        tokens, flops: of a step, of all devices.
        roofline: seconds by the other estimate.
        kinds: of arguments, as `kind_of` takes them.
    """
    table = schedule(compiled.text, compiled.collectives, machine, compiled.coords)
    bytes_of: dict[str, int] = {}
    for one in compiled.parameters:
        kind = kind_of(one["path"], kinds)
        bytes_of[kind] = bytes_of.get(kind, 0) + one["device_bytes"]
    sizes = ((p["path"], p["device_bytes"]) for p in compiled.parameters)
    largest = sorted(sizes, key=lambda one: -one[1])
    memory, chip = compiled.memory, machine.chip
    held = Held(
        bytes_of,
        activations=memory.temporaries + memory.outputs - memory.aliased,
        # A TPU's compiler refuses what does not fit; of what it took, it knows what lives at once.
        peak=memory.live if chip.platform == "tpu" and memory.live else memory.peak,
        capacity=machine.chip.memory,
        largest=tuple(largest[:5]),
    )
    wire: dict[str, int] = {}
    for one in compiled.collectives:
        wire[one.along] = wire.get(one.along, 0) + one.step_bytes
    counted = table.counted / table.seconds if table.seconds else 0.0
    sources = {
        "seconds": f"{counted:.0%} the compiler's cycles, of which a large product has as many as "
        f"{chip.reached:.0%} of the peak rate would; the rest as below"
        if chip.counted
        else f"products at {PRODUCT_SHARE} of the peak rate, or bytes at {MEMORY_SHARE} of the "
        "memory's, the slower",
        "loops": "" if table.known else "one of unknown length counts as if it turned once",
        "kernels": f"attention at {chip.busy:.0%} of the peak, others by their bytes",
        "collectives": f"links of {chip.link / 1e9:.0f} GB/s: {chip.sources.get('link', '')}",
        "memory": "the compiler",
        "capacity": chip.sources.get("memory", ""),
        "price": chip.sources.get("price", "no list price is known here; give one"),
        "roofline": "products and bytes of the function as it was traced",
    }
    found = Prediction(
        table.seconds, tokens, flops, machine, held, table.compute + table.kernels, table.exposed,
        table.sent, table.waited, wire, table.links, roofline, sources,
    )  # fmt: skip
    return found, table
