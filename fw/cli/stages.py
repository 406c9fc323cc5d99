"""`fw eval`, `fw compress`, `fw export`: one stage each on a run folder."""

import argparse
from typing import Any

from fw import pipeline, pruning, stages, target
from fw.compression import RECIPES
from fw.data import SPLITS
from fw.errors import FwError


def add_eval(subparsers: Any) -> argparse.ArgumentParser:
    """Adds `fw eval`."""
    parser = _run_parser(
        subparsers, "eval", "report on a split",
        "Evaluate the best model of a run: per type or class, with averages; by domain where the "
        "data has domains. Those of the f32 variant also go to RUN/result.json.",
    )  # fmt: skip
    _options(parser, "test")
    _variant(parser)

    def run(arguments: argparse.Namespace) -> int:
        summary = stages.evaluate_run(
            arguments.folder,
            arguments.split,
            name=arguments.variant,
            mesh=arguments.mesh,
            data=arguments.data,
        )
        print(summary.text)
        return 0

    parser.set_defaults(command=run)
    return parser


def add_compress(subparsers: Any) -> argparse.ArgumentParser:
    """Adds `fw compress`."""
    parser = _run_parser(
        subparsers, "compress", "make a smaller variant",
        "Compress a run's best model by a recipe: " + "; ".join(
            f"{name}: {text}" for name, (text, _) in RECIPES.items()
        ) + ". Calibrates on training examples where the recipe says so, writes "
        "RUN/compressed/NAME/ and prints bytes, error and quality before and after.",
    )  # fmt: skip
    _options(parser, "dev")
    parser.add_argument(
        "--recipe", metavar="NAME|FILE",
        help=f"{', '.join(RECIPES)}, or a .toml or .json file; one with [[stages]] runs all of "
        "them in RUN/pipelines/NAME/, or goes on where it was (default: int8)",
    )  # fmt: skip
    parser.add_argument(
        "--target", metavar="TEXT",
        help='instead of a recipe, look for one: "latency 2x, size 4x, quality -1" is twice as '
        "fast and a quarter of the bytes for a point at most; kept in RUN/targets/",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=float,
        help="with a target: what is left learns for, where units went (default: 4)",
    )  # fmt: skip

    def run(arguments: argparse.Namespace) -> int:
        if arguments.target is not None:
            return _search(arguments)
        if arguments.epochs is not None:
            raise FwError("epochs is for --target; a recipe's stages have their own")
        recipe = arguments.recipe or "int8"
        if pipeline.is_pipeline(recipe):
            folder = pipeline.pipeline(
                arguments.folder,
                recipe,
                split=arguments.split,
                mesh=arguments.mesh,
                data=arguments.data,
            )
            print(folder)
            return 0
        text = stages.compress_run(
            arguments.folder,
            recipe,
            split=arguments.split,
            mesh=arguments.mesh,
            data=arguments.data,
        )
        print(text)
        return 0

    parser.set_defaults(command=run)
    return parser


def _search(arguments: argparse.Namespace) -> int:
    """0 if something meets the target."""
    if arguments.recipe is not None or arguments.mesh != "data=1":
        raise FwError("target looks for a recipe, on one device; leave --recipe and --mesh away")
    epochs = 4.0 if arguments.epochs is None else arguments.epochs
    found = target.search(
        arguments.folder, target.Target.of(arguments.target), split=arguments.split,
        data=arguments.data, epochs=epochs,
    )  # fmt: skip
    print(found)
    if found.chosen is None:
        print(f"nothing that was tried meets the target; see {found.folder / target.PICTURE}")
        return 1
    print(found.folder)
    return 0


def add_prune(subparsers: Any) -> argparse.ArgumentParser:
    """Adds `fw prune`."""
    parser = _run_parser(
        subparsers, "prune", "take heads, neurons and layers out",
        "Take heads, neurons and layers out of a run's best model, and write what is left as a "
        "model folder. It learns again with: fw finetune --model OUTPUT --teacher RUN.",
    )  # fmt: skip
    parser.add_argument("output", metavar="OUTPUT", help="the model folder to make")
    parser.add_argument("--parameters", type=float, help="part of all parameters that may stay")
    parser.add_argument(
        "--flops", type=float, help="part of the products' operations that may stay, instead"
    )
    parser.add_argument(
        "--latency", type=float, help="part of a batch's time that may stay, measured here; instead"
    )
    parser.add_argument("--layers", type=int, help="layers that stay, evenly; instead")
    parser.add_argument(
        "--by", choices=pruning.SCORES, default=pruning.SCORES[0],
        help="how units are judged (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--among", default="", metavar="PATTERN",
        help="dimensions that may shrink, by the path of their first array (default: those of "
        "layers where there is a stack of them, else all)",
    )  # fmt: skip
    parser.add_argument(
        "--multiple",
        type=int,
        default=1,
        help="entries of an axis that go at once (default: %(default)s)",
    )
    _where(parser)

    def run(arguments: argparse.Namespace) -> int:
        names = (
            "parameters", "flops", "latency", "layers", "by", "among", "multiple", "mesh", "data"
        )  # fmt: skip
        options = {name: getattr(arguments, name) for name in names}
        print(stages.prune_run(arguments.folder, arguments.output, **options))
        return 0

    parser.set_defaults(command=run)
    return parser


def add_export(subparsers: Any) -> argparse.ArgumentParser:
    """Adds `fw export`."""
    parser = _run_parser(
        subparsers, "export", "write the artifact",
        "Write a folder that answers without this library's models: StableHLO for cpu, cuda, rocm "
        "and tpu with a symbolic batch, safetensors weights, tokenizer, labels, golden outputs "
        "and a manifest with the hash of each.",
    )  # fmt: skip
    _variant(parser)
    parser.add_argument("--output", metavar="DIR", help="where to (default: RUN/artifact)")

    def run(arguments: argparse.Namespace) -> int:
        print(stages.export_run(arguments.folder, name=arguments.variant, output=arguments.output))
        return 0

    parser.set_defaults(command=run)
    return parser


def _run_parser(subparsers: Any, name: str, short: str, text: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=short, description=text)
    parser.add_argument("folder", metavar="RUN", help="a run folder, made by fw finetune")
    return parser


def _options(parser: argparse.ArgumentParser, split: str) -> None:
    parser.add_argument(
        "--split", choices=SPLITS, default=split, help="of the run's data (default: %(default)s)"
    )
    _where(parser)


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", default="", metavar="PATH", help="where the run's data is now, if it has moved"
    )
    parser.add_argument("--mesh", default="data=1", help="devices by axis (default: %(default)s)")


def _variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant", default="f32",
        help="of the model: f32, bf16, or what fw compress made (default: %(default)s)",
    )  # fmt: skip
