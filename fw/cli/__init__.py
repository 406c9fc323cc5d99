"""The `fw` command: one subcommand for each arrow of the line, each a function of the library."""

from fw.cli.main import main

__all__ = ["main"]
