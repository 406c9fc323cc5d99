"""Model folders in the form of Hugging Face transformers, and adapters of PEFT, in and out."""

from fw.hub.adapter import Adapter, load_adapter, save_adapter
from fw.hub.attached import attach, detach, merge
from fw.hub.families import FAMILIES, Family, own_family
from fw.hub.folder import Loaded, load, save
from fw.hub.new import new

__all__ = [
    "FAMILIES",
    "Adapter",
    "Family",
    "Loaded",
    "attach",
    "detach",
    "load",
    "load_adapter",
    "merge",
    "new",
    "own_family",
    "save",
    "save_adapter",
]
