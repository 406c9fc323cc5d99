"""Pretrained weights and data with a provenance: pinned, checked, kept once.

`fetch` gives a folder for a name; `catalogue` lists the names; `verify` hashes what is there.
"""

from fw.assets.cache import asset_folder, cache_folder, fetch
from fw.assets.command import add_parser, cli
from fw.assets.entries import Asset, File, Hub, Package, Url, catalogue, read_catalogue
from fw.assets.provenance import verify

__all__ = [
    "Asset",
    "File",
    "Hub",
    "Package",
    "Url",
    "add_parser",
    "asset_folder",
    "cache_folder",
    "catalogue",
    "cli",
    "fetch",
    "read_catalogue",
    "verify",
]
