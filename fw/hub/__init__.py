"""Model folders in the form of Hugging Face transformers, in and out."""

from fw.hub.families import FAMILIES, Family
from fw.hub.folder import Loaded, load, save

__all__ = ["FAMILIES", "Family", "Loaded", "load", "save"]
