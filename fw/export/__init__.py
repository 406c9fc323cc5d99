"""A trained model as a folder that answers: `save` writes an artifact, `load` checks it and runs it.

| file | what it does |
| --- | --- |
| `manifest` | what is in the folder, and whether it still is |
| `save` | model record → StableHLO, weights, tokenizer, golden outputs |
| `load` | folder → `Artifact`, with no code of the model |
| `predict` | texts → answers |
| `command` | `fw predict` |
"""

from fw.export.load import Artifact, load
from fw.export.save import load_variables, save

__all__ = ["Artifact", "load", "load_variables", "save"]
