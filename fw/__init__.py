"""From a pretrained checkpoint to a small, verified artifact; the guide is README.md.

| in the order of the flow | |
| --- | --- |
| `recipe`, `finetune`, `stages` | the line from end to end, a function for each stage |
| `assets`, `hub`, `gguf`, `model`, `models`, `precision` | what comes in, and what it becomes |
| `data`, `tasks`, `metrics` | text to batches; what is minimised and counted |
| `optimizer`, `step`, `train`, `evaluate`, `checkpoint` | training |
| `run`, `report`, `export`, `compare` | what is left behind |
| `host`, `options`, `cli`, `errors` | around it |

A module is imported when it is first used, so `import fw` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fw import (
        assets,
        checkpoint,
        cli,
        compare,
        data,
        errors,
        evaluate,
        export,
        finetune,
        gguf,
        host,
        hub,
        metrics,
        model,
        models,
        optimizer,
        options,
        precision,
        recipe,
        report,
        run,
        stages,
        step,
        tasks,
        train,
    )

    __version__: str

__all__ = [
    "__version__",
    "assets",
    "checkpoint",
    "cli",
    "compare",
    "data",
    "errors",
    "evaluate",
    "export",
    "finetune",
    "gguf",
    "host",
    "hub",
    "metrics",
    "model",
    "models",
    "optimizer",
    "options",
    "precision",
    "recipe",
    "report",
    "run",
    "stages",
    "step",
    "tasks",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("fw")
    if name in __all__:
        return import_module(f"fw.{name}")
    raise AttributeError(f"module 'fw' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
