"""A trained model as a folder that answers: `save` writes it, `load` checks it and runs it.

| file | what it does |
| --- | --- |
| `manifest` | what is in the folder, and whether it still is |
| `function` | model record → StableHLO with symbolic sizes |
| `golden` | a batch, and what the model made of it |
| `save` | that, weights, tokenizer and golden outputs → folder |
| `load` | folder → `Artifact`, with no code of the model |
| `command` | `fw predict` |
"""

from fw.export.load import Artifact, load
from fw.export.save import load_variables, save
from fw.processors.text import Text

__all__ = ["Artifact", "Text", "load", "load_variables", "save"]
