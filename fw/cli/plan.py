"""`fw plan`: which layout a training step should have on a machine that need not be here."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from fw.errors import FwError

_HELP = """\
Estimates thousands of layouts of a training step, compiles the most promising with the real
compilers of TPU and GPU (pip install 'fw[plan]'; no chip is needed), and ranks what they made: step
time, memory of a device, price. DIR gets plan.json and plan.html.

  fw plan --model llama-2-70b --hardware v5p:8x8x16 --batch 1024 --length 4096 --out plan/
  fw plan --model all-MiniLM-L6-v2 --task ner --hardware cpu --batch 32
  fw plan --model dlrm --config columns=user/item,rows=90000000/2000000,size=128,numbers=price \
    --hardware v5e:4x4 --batch 65536
  fw plan --model my/config.json --hardware 2*v5e:16x16 --batch 2048 --layout fsdp=64,tensor=4
  fw plan --model llama-3.1-70b --hardware v5e:4x4 --batch 64 --length 2048 --lora 16,16:nf4
  fw plan --list-hardware
  fw finetune ... --plan plan/plan.json             trains with the best of them
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "plan", help="the best layout for a machine", description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--model",
        default="",
        help="llama-2-70b, all-MiniLM-L6-v2, a folder, a config.json; or a new dlrm, unet …",
    )
    add("--hardware", default="", help="v5e:16x16, 2*v5p:8x8x8, h100:4x8, cpu; see --list-hardware")
    add("--list-hardware", action="store_true", help="every chip, its figures and their sources")
    add("--batch", type=int, default=0, help="rows of a step, all devices together")
    add("--length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    add("--task", default=None, help="ner, classify, lm …, as for fw finetune; the model's first")
    add("--classes", type=int, default=2, help="labels of the head (default: %(default)s)")
    add("--size", type=int, default=0, help="side of images in pixels (default: the model's)")
    add("--channels", type=int, default=3, help="of images of a new model (default: %(default)s)")
    add("--history", type=int, default=50, help="items of a user (default: %(default)s)")
    add("--table-optimizer", default="rowwise_adagrad", help="of tables: lazy_adam, sgd")
    add("--precision", default="", help="bf16_activations (the default but for a CPU), bf16 or f32")
    add("--config", default="", help="keys of the config: num_hidden_layers=16,… rows=1000/40,…")
    add("--remat", default="", help="what may be computed again: none, dots, layer; with commas")
    add("--moments", default="float32", help="of the optimiser: float32, 8bit; with commas")
    add("--lora", default="0", help="adapters that may be trained: 16, 16:nf4; 0: the whole model")
    add("--accumulate", default="", help="microbatches that may be taken, with commas")
    add("--rules", default="fsdp_tensor", help="preset of the layout (default: %(default)s)")
    add("--compile", type=int, default=4, help="layouts that the compiler decides among; 0: none")
    add("--minutes", type=float, default=15.0, help="after which nothing more is compiled")
    add("--prices", default="", help="dollars a chip and hour: v5e=1.2,h100=2.5, or a JSON file")
    add("--layout", default="", help="say what stands against this mesh, as fsdp=64,tensor=4")
    add("--out", default="", help="a folder for plan.json and plan.html")
    parser.set_defaults(command=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Plans, prints, writes."""
    from fw.adaptation import LoraOptions
    from fw.planning import adapters_of, plan_training, priced, read_prices
    from fw.work import Work
    from sharding.plan import hardware, why
    from sharding.plan.terminal import hardware_table

    if arguments.list_hardware:
        print(hardware_table())
        return 0
    for name in ("model", "hardware", "batch"):
        if not getattr(arguments, name):
            raise FwError(f"plan: --{name} is missing; see fw plan --help")
    machine = priced(hardware(arguments.hardware), read_prices(arguments.prices))
    on_cpu = machine.chip.platform == "cpu"
    work = Work(
        arguments.model, arguments.batch, arguments.length, task=arguments.task,
        classes=arguments.classes, size=arguments.size, channels=arguments.channels,
        history=arguments.history, table_optimizer=arguments.table_optimizer,
        precision=arguments.precision or ("bf16" if on_cpu else "bf16_activations"),
        rules=arguments.rules, config=arguments.config, remat=_remats(arguments.remat),
        moments=tuple(arguments.moments.split(",")), accumulate=_numbers(arguments.accumulate),
        adapters=tuple(LoraOptions(**adapters_of(text)) for text in arguments.lora.split(",")),
    )  # fmt: skip
    found = plan_training(
        work, machine, compile=arguments.compile, seconds=60 * arguments.minutes, told=Told()
    )
    print(found)
    if arguments.layout:
        choices = dict(found.best.candidate.variant.choices)
        print(f"\n{why(found, arguments.layout, choices)}")
    if arguments.out:
        from fw.report.plan import page

        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        found.save(folder / "plan.json")
        page(found, folder / "plan.html", title=f"{arguments.model} on {machine}")
        print(f"\n{folder / 'plan.json'}\n{folder / 'plan.html'}")
    return 0


class Told:
    """Shows how far a plan is, on the line that `fw finetune` shows its steps on."""

    def __init__(self) -> None:
        from fw.train import Progress

        self.progress, self.shown = Progress(1), 0.0

    def __call__(self, text: str, left: float) -> None:
        """Shows `text`, and `left`, seconds."""
        stays = text.startswith("compiled")
        if stays:
            self.progress.say(text)
        elif time.monotonic() - self.shown > (0.1 if sys.stderr.isatty() else 10.0):
            self.shown = time.monotonic()
            self.progress.line(text, left)


def _remats(text: str) -> tuple[str | None, ...] | None:
    if not text:
        return None
    known = {"none": None, "dots": "dots", "layer": "layer", "stage": "stage"}
    for name in text.split(","):
        if name not in known:
            raise FwError(f"remat {name!r}: expected some of {', '.join(known)}")
    return tuple(known[name] for name in text.split(","))


def _numbers(text: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        raise FwError(f"accumulate {text!r}: expected numbers, as in 1,2,4") from None
