import pytest

from dpsgd.config import DataConfig
from dpsgd.data.facts import PUBLISHED, declared_num_examples, published_facts
from dpsgd.data.sources import load_datasets
from dpsgd.errors import ConfigError


def test_declared_size_goes_before_the_published_one() -> None:
    config = DataConfig(source="torchvision", name="cifar10", num_examples=45_000)

    assert declared_num_examples(config, rows_held=45_001) == 45_000


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_published_size_of_a_named_set_is_used_with_any_source(name: str) -> None:
    size = 60_000 if "mnist" in name else 50_000
    for source in ("torchvision", "parquet", "image_folder"):
        config = DataConfig(source=source, name=name)
        assert declared_num_examples(config, rows_held=17) == size


@pytest.mark.parametrize("name", [None, "my_photographs"])
def test_size_is_never_counted_from_the_rows_held(name: str | None) -> None:
    config = DataConfig(source="parquet", name=name)
    with pytest.raises(
        ConfigError,
        match=r"data\.num_examples=null: is a public constant that you declare, never "
        r"counted from private data; add data\.num_examples: 123 if that count",
    ):
        declared_num_examples(config, rows_held=123)


def test_torchvision_names_have_published_sizes() -> None:
    assert PUBLISHED["svhn"].num_examples == 73_257
    assert {"cifar10", "cifar100", "mnist", "fashion_mnist"} < set(PUBLISHED)


def test_published_facts_of_digits_are_those_of_the_loaded_set() -> None:
    config = DataConfig(source="digits")
    facts = published_facts(config)
    train = load_datasets(config).train

    assert facts is not None
    assert facts.num_examples == len(train)
    assert facts.image_shape == train.image_shape
    assert facts.class_names == train.class_names


def test_files_of_ones_own_have_no_published_facts() -> None:
    assert published_facts(DataConfig(source="parquet", name="cifar10")) is None


def test_declared_size_replaces_the_published_one_in_the_facts() -> None:
    config = DataConfig(source="torchvision", name="cifar10", num_examples=45_000)
    facts = published_facts(config)

    assert facts is not None
    assert facts.num_examples == 45_000
    assert facts.image_shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "size", "num_classes"),
    [("imagenet", 1_281_167, 1000), ("places365", 1_803_460, 365)],
)
def test_large_sets_are_planned_for_without_their_stores(
    name: str, size: int, num_classes: int
) -> None:
    config = DataConfig(source="store", name=name, image_size=320)
    facts = published_facts(config)

    assert facts is not None
    assert facts.num_examples == size == declared_num_examples(config, rows_held=9)
    assert facts.image_shape == (3, 320, 320)
    assert facts.num_classes == num_classes
