"""The settings of a run, one frozen dataclass a section of the YAML file.

Public facts are fields; facts that depend on the data are arguments elsewhere.
Nothing in `runtime` and `report` changes what is learned, beyond float rounding.
"""

from dataclasses import dataclass, field
from typing import Literal

from dpsgd.config.rules import (
    AboveOne,
    AugmentationName,
    Fraction,
    NoiseName,
    NonNegative,
    NonNegativeInt,
    Norm,
    Positive,
    PositiveInt,
    PrivacyUnit,
    UnitInterval,
)

__all__ = [
    "Config",
    "DataConfig",
    "EmaConfig",
    "EvalConfig",
    "FinetuneConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrivacyConfig",
    "ReportConfig",
    "RuntimeConfig",
    "TrainConfig",
]


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
    """Give an example the same K views in every step and every run, by its row and
    their number alone, so that their features can be cached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which network is trained."""

    name: str = "wide_resnet"
    """Registered architecture."""

    depth: PositiveInt = 16
    """Number of layers: 6n + 4 for a Wide-ResNet, convolutions for a convnet, 50, 101,
    152, 200 or 288 for an NF-ResNet."""

    variant: Literal["F0", "F1", "F2", "F3", "F4", "F5", "F6"] | None = None
    """Size of an NFNet; null for all other networks."""

    width: PositiveInt = 4
    """Channel multiplier: stages of a Wide-ResNet have 16, 32 and 64 times it, layers
    of a convnet 16, 32, 64 and so on."""

    normalization: Literal["group_norm", "none"] = "group_norm"
    """Normalisation within one example; batch normalisation mixes examples. NF-ResNets
    and NFNets have `none`."""

    groups: PositiveInt = 16
    """Groups of the group normalisation."""

    order: Literal["activation_norm", "norm_activation"] = "activation_norm"
    """ReLU before or after normalisation; the paper's is ReLU first."""

    weight_standardization: bool = True
    """Whether convolutions standardise their weights (Qiao et al. 2019)."""

    skip_gain_init: NonNegative = 0.0
    """Where the factor that an NF-ResNet or NFNet learns for each residual branch
    starts, >= 0: 0 as published, 1 for training from scratch with privacy."""

    stochastic_depth: Fraction = 0.0
    """Rate in [0, 1) at which the last residual branch of an NF-ResNet or NFNet is left
    out for a view, in training alone; it rises linearly from 0 at the first."""

    num_classes: PositiveInt | None = None
    """Outputs of the classifier; null takes the classes that the data set declares."""

    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of activations. Parameters, norms, sums and noise are float32 or wider."""

    stride_padding: Literal["symmetric", "same"] = "symmetric"
    """Where a convolution with a stride pads: half a kernel on every side, or, as JAX's
    SAME, no more than the stride needs and the odd pixel last. Weights that were
    trained with one are worth less with the other."""

    init_from: str | None = None
    """Weights to start from, public by your declaration: a run directory, a
    .safetensors, .pt, .pth or .npz file, torchvision:NAME or timm:NAME. The guarantee
    does not cover the data that they were trained on."""

    init_weights: Literal["auto", "ema", "last"] = "auto"
    """Which weights of a run to take; `auto` takes the average if it keeps one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """What is trained of a network that starts from given weights."""

    train: str = "all"
    """`all`, `classifier`, `norm_and_classifier`, or a regular expression that the
    whole name of a parameter must match. The others stay as they are, bit for bit:
    they have no gradient, no norm and no noise."""

    classifier: Literal["initialize", "zero", "load"] = "initialize"
    """The classifier of a network with `model.init_from`: drawn as from scratch, set
    to zero, or loaded with the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyConfig:
    """The guarantee, and the mechanism that provides it."""

    enabled: bool = True
    """False trains WITHOUT any privacy, on public data: shuffled batches of
    `expected_batch_size` examples, no clipping, no noise, no guarantee. Nothing else
    of this section may be set then."""

    unit: PrivacyUnit = "example"
    """Whose presence is hidden: one example, with all its views, or one user, with all
    its examples. Users come from `data.user_column`."""

    max_examples_per_user: PositiveInt | None = None
    """Most examples of one user in a step, >= 1, public; needed where the unit is the
    user. A user with more takes part with a new random subset every step. Passes cost
    as if every user had this many."""

    target_epsilon: Positive | None = None
    """Epsilon to spend at most, > 0; the noise multiplier is calibrated to it.
    Exactly one of this and `noise_multiplier` is given."""

    noise_multiplier: NonNegative | None = None
    """Noise standard deviation over l2_sensitivity, >= 0; 0 has no guarantee."""

    max_epsilon: Positive | None = None
    """Hard limit, > 0: training stops before the step that would pass it."""

    delta: float | None = None
    """Delta of (epsilon, delta)-DP, in (0, 1/num_examples), or (0, 1/num_users);
    required with privacy."""

    expected_batch_size: Positive
    """Public expected number of units, examples or users, a step: the divisor of every
    update, and the sampling probability once divided by `num_examples` or
    `num_users`."""

    clipping_norm: Norm = 1.0
    """Bound C on the L2 norm of one unit's gradient, >= 1e-12, in gradient units."""

    rescale_to_unit_norm: bool = True
    """Divide clipped gradients by C, so that the learning rate does not depend on C."""

    noise: NoiseName = "standard"
    """`standard` is float32 noise from a keyed statistical generator: fast, repeatable
    on resume. `secure` is drawn from the operating system, rounded exactly to a grid,
    and withstands floating-point attacks; it takes some 0.1 microseconds a parameter
    and step, and no seed."""

    accountant: str = "prv"
    """Registered accountant that certifies epsilon: prv, pld or rdp. The first, though
    the slowest, rests on a published package; rdp asks for 5 to 10 % more noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """What is done with the noisy gradient."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Update rule; the paper's is plain SGD."""

    learning_rate: Positive
    """Step size, > 0, at the top of the schedule."""

    momentum: Fraction = 0.0
    """SGD momentum, in [0, 1)."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW decay rates of the two moments, in [0, 1)."""

    weight_decay: NonNegative = 0.0
    """Decay, >= 0: added to the gradient by SGD, decoupled in AdamW."""

    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: constant, or falling to 0 along half a cosine or a line."""

    decay_steps: PositiveInt | None = None
    """Last steps of the run, over which a cosine or line falls; the learning rate is
    constant before them. Null takes all steps after the warm-up."""

    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig:
    """The exponential moving average of the parameters."""

    decay: Fraction | None = 0.9999
    """Decay in [0, 1), after the warm-up; null keeps no average."""

    warmup: AboveOne = 10.0
    """Update t has a decay of at most (1 + t)/(warmup + t), > 1: with decay near 1, the
    average is over about the last t/warmup updates. 10 is the paper's; 2 weighs all
    updates equally."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, and from which randomness."""

    num_steps: PositiveInt
    """Steps T: each is one draw, one noise, one update and one composition."""

    label_smoothing: Fraction = 0.0
    """Share of each label, in [0, 1), that is spread evenly over all classes."""

    seed: int | None = None
    """Null draws every stream from the operating system. A seed makes the run
    repeatable, and so unfit to be released as private."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """When the test accuracy is measured."""

    every: PositiveInt = 100
    """Steps between evaluations; the last step is always evaluated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how fast: nothing here changes what is learned beyond rounding."""

    device: str = "auto"
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`."""

    parallel: Literal["none", "ddp", "fsdp"] = "none"
    """How processes that torchrun started train one network: `ddp` keeps it whole on
    each, `fsdp` keeps parameters, momenta and average in shards, and needs the network
    to fit on one device only while a gradient is computed."""

    microbatch_size: PositiveInt | Literal["auto"] = "auto"
    """Examples or users a pass: memory only; the update never depends on it."""

    engine: Literal["auto", "vmap", "ghost"] = "auto"
    """How gradients of examples are bounded: `vmap` holds those of a pass, `ghost`
    takes norms layer by layer and stores what is cheap to store. `auto` is `ghost`,
    unless passes are compiled or noise is secure."""

    execution: Literal["auto", "eager", "compile", "cuda_graph"] = "auto"
    """How the gradient pass runs: operator by operator, compiled with torch.compile, or
    recorded once and replayed. `auto` replays on CUDA and is eager elsewhere."""

    decode_workers: NonNegativeInt | Literal["auto"] = "auto"
    """Processes that decode the images of a store; 0 decodes in the training process.
    `auto` is one a CPU core on Linux, and 0 elsewhere."""

    feature_cache: str | None = None
    """File that keeps the features of frozen layers, made if it is not there, for
    `finetune.train: classifier` and views that are the same in every step. It is as
    private as the training data."""

    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints; every evaluation is preceded by one as well."""

    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept, besides the best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What a run writes about itself."""

    unprotected_metrics: bool = False
    """Also record train loss, gradient norms, share of clipped examples and realised
    batch sizes. They are computed from private data without noise: the guarantee
    does not cover them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run."""

    data: DataConfig
    """Examples and views."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """What is trained of it."""

    privacy: PrivacyConfig
    """Guarantee and mechanism."""

    optimizer: OptimizerConfig
    """Update rule."""

    ema: EmaConfig = field(default_factory=EmaConfig)
    """Parameter averaging."""

    train: TrainConfig
    """Length and seed."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Machine."""

    report: ReportConfig = field(default_factory=ReportConfig)
    """Reporting."""

    @property
    def views_per_unit(self) -> int:
        """Views that a pass makes of one unit: K, or K of each of a user's examples."""
        examples = self.privacy.max_examples_per_user or 1
        return examples * self.data.augmentation_multiplicity
