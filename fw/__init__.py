"""From a pretrained checkpoint to a small, verified artifact; the guide is README.md.

| in the order of the flow | |
| --- | --- |
| `recipe`, `finetune`, `stages`, `pipeline`, `target` | the line, a function for each stage |
| `assets`, `pretrained`, `hub`, `gguf` | what comes in |
| `model`, `models`, `precision`, `convolve` | what it becomes |
| `data`, `processors`, `tasks`, `metrics` | things to batches; what is minimised and counted |
| `pruning`, `adaptation`, `qat` | what is left, what of it is trained, and how |
| `distillation`, `lessons`, `taps`, `answers` | who teaches it, and what |
| `optimizer`, `table_optimizer`, `sparsity`, `exchange` | how far a step goes, what it sends |
| `work`, `planning` | which layout a step should have, on a machine that need not be here |
| `training`, `step`, `train`, `evaluate`, `checkpoint` | training |
| `generation` | text from a decoder |
| `run`, `report`, `compression`, `variants`, `export`, `tiles`, `compare` | what is left behind |
| `host`, `options`, `cli`, `errors` | around it |

`load`, `save` and `generate` are functions of these. A module is imported when it is first used, so
`import fw` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fw import (
        adaptation,
        answers,
        assets,
        checkpoint,
        cli,
        compare,
        compression,
        convolve,
        data,
        distillation,
        errors,
        evaluate,
        exchange,
        export,
        finetune,
        generation,
        gguf,
        host,
        hub,
        lessons,
        metrics,
        model,
        models,
        optimizer,
        options,
        pipeline,
        planning,
        precision,
        pretrained,
        processors,
        pruning,
        qat,
        recipe,
        report,
        run,
        sparsity,
        stages,
        step,
        table_optimizer,
        taps,
        target,
        tasks,
        tiles,
        train,
        training,
        variants,
        work,
    )
    from fw.generation import generate
    from fw.pretrained import load, save

    __version__: str

_FUNCTIONS = {"generate": "fw.generation", "load": "fw.pretrained", "save": "fw.pretrained"}

__all__ = [
    "__version__",
    "adaptation",
    "answers",
    "assets",
    "checkpoint",
    "cli",
    "compare",
    "compression",
    "convolve",
    "data",
    "distillation",
    "errors",
    "evaluate",
    "exchange",
    "export",
    "finetune",
    "generate",
    "generation",
    "gguf",
    "host",
    "hub",
    "lessons",
    "load",
    "metrics",
    "model",
    "models",
    "optimizer",
    "options",
    "pipeline",
    "planning",
    "precision",
    "pretrained",
    "processors",
    "pruning",
    "qat",
    "recipe",
    "report",
    "run",
    "save",
    "sparsity",
    "stages",
    "step",
    "table_optimizer",
    "taps",
    "target",
    "tasks",
    "tiles",
    "train",
    "training",
    "variants",
    "work",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("fw")
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    if name in __all__:
        return import_module(f"fw.{name}")
    raise AttributeError(f"module 'fw' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
