"""`bin/dpsgd-privacy`: what a run reveals, and what an epsilon allows; one a file."""

from dpsgd.cli.privacy.command import main

__all__ = ["main"]
