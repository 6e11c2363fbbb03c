"""Many processes, one run: ranks, where leaves lie, and the one sum over all ranks."""

from dpsgd.parallel.layout import Layout
from dpsgd.parallel.ranks import Ranks, joined
from dpsgd.parallel.sharding import laid_out

__all__ = ["Layout", "Ranks", "joined", "laid_out"]
