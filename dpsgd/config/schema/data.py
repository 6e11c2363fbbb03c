"""Settings of the examples and their views."""

from dataclasses import dataclass
from typing import Literal

from dpsgd.config.rules import (
    AugmentationName,
    NonNegativeInt,
    Positive,
    PositiveInt,
    UnitInterval,
)

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which examples are trained on, and how views of them are made."""

    source: Literal["digits", "torchvision", "parquet", "image_folder", "store"]
    """Where images come from; `digits` ships with scikit-learn and needs no files. All
    but `store` hold their images in memory; bin/dpsgd-prepare makes a store."""

    name: str | None = None
    """Data set: cifar10, cifar100, mnist, fashion_mnist or svhn for torchvision. With
    another source it only says whose published size `num_examples` falls back to: one
    of these, imagenet or places365."""

    root: str = "data"
    """Folder that torchvision downloads to."""

    train: str | tuple[str, ...] | None = None
    """Training files: path, list of paths, glob, or folder of shards or of classes; or
    one store."""

    test: str | tuple[str, ...] | None = None
    """Test files, in the same forms; the test set is treated as public."""

    image_column: str | None = None
    """Parquet column of images; found by its type when null."""

    label_column: str | None = None
    """Parquet column of labels; found by its type when null."""

    user_column: str | None = None
    """Parquet column of integers or text that says whose each training example is;
    goes with `privacy.unit: user`. Two names of one person are two users."""

    group_column: str | None = None
    """Parquet column of the test files, integers, text or booleans, by which test
    accuracy is also told; training never reads it."""

    num_examples: PositiveInt | None = None
    """Size N of the training set, a public constant that you declare. Null takes the
    published size of a named public data set; it is never counted from the files."""

    num_users: PositiveInt | None = None
    """Number N of users in the training set where the unit is the user, a public
    constant that you declare like `num_examples`; never counted from the files."""

    mean: tuple[UnitInterval, ...] = (0.5,)
    """Public constant a channel, in [0, 1], subtracted from pixels / 255. Never
    computed from private data; the default maps pixels to [-1, 1]."""

    std: tuple[Positive, ...] = (0.5,)
    """Public constant a channel, > 0, that pixels are divided by after `mean`."""

    image_size: PositiveInt | None = None
    """Side in pixels of the square views of a store's images; required there. Without
    augmentation a view is the largest central square, scaled to it."""

    eval_image_size: PositiveInt | None = None
    """The same for the images of a test store; null takes `image_size`."""

    augmentation: AugmentationName = "none"
    """How a view differs from its image: padded and randomly cropped, flipped, both. Of
    a store: flipped; `scaled_crop_flip`, the paper's, the central square scaled to 1.2
    times `image_size`, cropped and flipped; or `resized_crop_flip`, 8 to 100 % of the
    image's area at an aspect of 3/4 to 4/3, scaled and flipped."""

    crop_padding: NonNegativeInt = 4
    """Pixels mirrored around the image before a random crop of its own size."""

    augmentation_multiplicity: PositiveInt = 1
    """Views K of each example, averaged before clipping: they cost no privacy."""

    mixed_views: NonNegativeInt = 0
    """How many of the K views are mixtures of two others of the same example, at random
    weights (self-mixup, Bao et al. 2023): like other views, they cost no privacy."""

    fixed_views: bool = False
    """Give an example the same K views in every step and every run, by its image and
    their number alone, so that their features can be cached."""
