"""Stores: images that do not fit into memory, packed so that any is read at any time.

Poisson sampling needs any example at any step, so what is packed is never streamed.
"""

from dpsgd.data.store.preparing import Resizing, prepare
from dpsgd.data.store.reading import Store
from dpsgd.data.store.sources import ImageSource, open_source
from dpsgd.data.store.writing import StoreWriter

__all__ = [
    "ImageSource",
    "Resizing",
    "Store",
    "StoreWriter",
    "open_source",
    "prepare",
]
