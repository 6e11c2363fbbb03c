"""`bin/dpsgd-data`: what two sets share, and how one is freed of it; one a file."""

from dpsgd.cli.data.command import main

__all__ = ["main"]
