"""Data: images held as tensors, the Poisson draw of each step, views of what it drew.

`sampling` is on the privacy path: the guarantee holds for the draws it makes.
"""

from dpsgd.data.ahead import LoadAhead
from dpsgd.data.augmentation import ViewParameters, draw_views, make_views, normalize
from dpsgd.data.batches import (
    LoadViews,
    Share,
    UserViewLoader,
    ViewLoader,
    everything,
)
from dpsgd.data.canaries import (
    GradientCanaries,
    draw_coins,
    extended,
    mislabelled,
    require_room,
)
from dpsgd.data.dataset import (
    Dataset,
    DataSplits,
    ImageDataset,
    has_room,
    held_in_memory,
    upload,
)
from dpsgd.data.facts import PublicFacts, declared_num_examples, published_facts
from dpsgd.data.labels import check_labels
from dpsgd.data.leave_out import leave_out
from dpsgd.data.new_folder import new_folder, told_of_writing
from dpsgd.data.overlap import FRAMINGS, Framing, Matches, find_matches
from dpsgd.data.overlap_report import Overlap, OverlapReport, PublicImage
from dpsgd.data.sampling import Microbatch, PoissonSampler, microbatches
from dpsgd.data.sources import SOURCES, load_datasets, load_images
from dpsgd.data.store import (
    Resizing,
    Store,
    StoreDataset,
    num_decode_workers,
    open_source,
    prepare,
)
from dpsgd.data.users import UserExamples

__all__ = [
    "FRAMINGS",
    "SOURCES",
    "DataSplits",
    "Dataset",
    "Framing",
    "GradientCanaries",
    "ImageDataset",
    "LoadAhead",
    "LoadViews",
    "Matches",
    "Microbatch",
    "Overlap",
    "OverlapReport",
    "PoissonSampler",
    "PublicFacts",
    "PublicImage",
    "Resizing",
    "Share",
    "Store",
    "StoreDataset",
    "UserExamples",
    "UserViewLoader",
    "ViewLoader",
    "ViewParameters",
    "check_labels",
    "declared_num_examples",
    "draw_coins",
    "draw_views",
    "everything",
    "extended",
    "find_matches",
    "has_room",
    "held_in_memory",
    "leave_out",
    "load_datasets",
    "load_images",
    "make_views",
    "microbatches",
    "mislabelled",
    "new_folder",
    "normalize",
    "num_decode_workers",
    "open_source",
    "prepare",
    "published_facts",
    "require_room",
    "told_of_writing",
    "upload",
]
