"""Stores: images that do not fit into memory, packed so that any is read at any time.

Poisson sampling needs any example at any step, so what is packed is never streamed.
"""

from dpsgd.data.store.dataset import StoreDataset, load_stores
from dpsgd.data.store.decoding import num_decode_workers
from dpsgd.data.store.preparing import Resizing, prepare
from dpsgd.data.store.reading import Store
from dpsgd.data.store.sources import ImageSource, open_source
from dpsgd.data.store.writing import StoreWriter

__all__ = [
    "ImageSource",
    "Resizing",
    "Store",
    "StoreDataset",
    "StoreWriter",
    "load_stores",
    "num_decode_workers",
    "open_source",
    "prepare",
]
