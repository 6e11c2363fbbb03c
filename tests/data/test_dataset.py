import dataclasses

import pytest
import torch

from dpsgd.data.dataset import DataSplits, ImageDataset
from dpsgd.errors import DataError


def make_dataset(num_examples: int = 6, num_classes: int = 3) -> ImageDataset:
    pixels = torch.arange(num_examples * 2 * 4 * 5) % 251
    return ImageDataset(
        images=pixels.to(torch.uint8).reshape(num_examples, 2, 4, 5),
        labels=torch.arange(num_examples) % max(num_classes, 3),
        class_names=tuple("abcdef"[:num_classes]),
    )


def test_length_and_image_shape_are_those_of_the_tensors() -> None:
    dataset = make_dataset()

    assert len(dataset) == 6
    assert dataset.image_shape == (2, 4, 5)


def test_fingerprint_changes_with_one_pixel_one_label_or_the_shape() -> None:
    dataset = make_dataset()
    images, labels = dataset.images.clone(), dataset.labels.clone()
    images[3, 1, 2, 4] += 1
    labels[5] = 0
    others = [
        dataclasses.replace(dataset, images=images),
        dataclasses.replace(dataset, labels=labels),
        dataclasses.replace(dataset, images=dataset.images.reshape(6, 2, 5, 4)),
    ]
    prints = {dataset.fingerprint(), *(other.fingerprint() for other in others)}

    assert len(prints) == 4
    assert all(len(text) == 64 for text in prints)


def test_fingerprint_depends_on_content_and_not_on_memory_layout() -> None:
    dataset = make_dataset()
    strided = dataset.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    assert not strided.is_contiguous()
    other = dataclasses.replace(dataset, images=strided)
    assert other.fingerprint() == make_dataset().fingerprint()


@pytest.mark.parametrize("label", [-1, 3])
def test_first_label_outside_the_classes_is_named(label: int) -> None:
    dataset = make_dataset()
    labels = dataset.labels.clone()
    labels[4:] = label
    with pytest.raises(
        DataError, match=rf"^labels=row 4: has label {label}, .* in \[0, 3\);"
    ):
        dataclasses.replace(dataset, labels=labels)


def test_without_declared_classes_only_negative_labels_are_refused() -> None:
    dataset = make_dataset(num_classes=0)
    dataclasses.replace(dataset, labels=torch.full((6,), 10**6))
    with pytest.raises(DataError, match=r"^labels=row 0: has label -1, .* at least 0;"):
        dataclasses.replace(dataset, labels=torch.full((6,), -1))


def test_declaring_classes_later_checks_the_labels_again() -> None:
    dataset = make_dataset(num_classes=0)

    assert dataclasses.replace(dataset, class_names=("a", "b", "c")).class_names
    with pytest.raises(DataError, match=r"labels=row 2: has label 2"):
        dataclasses.replace(dataset, class_names=("a", "b"))


def test_wrong_shapes_and_types_are_refused() -> None:
    dataset = make_dataset()
    with pytest.raises(DataError, match=r"images=<torch\.float32 of shape"):
        dataclasses.replace(dataset, images=dataset.images.float())
    with pytest.raises(
        DataError, match=r"must be torch\.uint8 of shape \(N, C, H, W\)"
    ):
        dataclasses.replace(dataset, images=dataset.images[0])
    with pytest.raises(DataError, match=r"labels=<torch\.int32 of shape"):
        dataclasses.replace(dataset, labels=dataset.labels.int())
    with pytest.raises(DataError, match=r"must be torch\.int64 of shape \(N,\)"):
        dataclasses.replace(dataset, labels=dataset.labels[:, None])
    with pytest.raises(DataError, match=r"<5 labels>.*there are 6"):
        dataclasses.replace(dataset, labels=dataset.labels[:5])


def test_splits_of_different_image_shape_are_refused() -> None:
    dataset = make_dataset()
    narrow = dataclasses.replace(dataset, images=dataset.images[..., :3])
    with pytest.raises(DataError, match=r"\(2, 4, 3\).*training images' shape"):
        DataSplits(train=dataset, test=narrow)


def test_splits_with_different_classes_are_refused_and_the_difference_listed() -> None:
    dataset = make_dataset()
    other = dataclasses.replace(dataset, class_names=("a", "c", "x"))
    with pytest.raises(DataError, match=r"data\.test=.*lacks b, has besides x; make"):
        DataSplits(train=dataset, test=other)


def test_place_on_the_cpu_keeps_the_content() -> None:
    dataset = make_dataset()

    assert dataset.placed("cpu").fingerprint() == dataset.fingerprint()


@pytest.mark.parametrize(("share", "expected"), [(2.9, "cpu"), (3.1, "moved")])
def test_place_moves_a_data_set_that_takes_a_third_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, share: float, expected: str
) -> None:
    dataset = make_dataset()
    size = dataset.images.nbytes + dataset.labels.nbytes
    free = (int(share * size), 10**12)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: free)
    moved = make_dataset()
    monkeypatch.setattr(ImageDataset, "to", lambda self, device: moved)

    assert dataset.placed("cuda:0") is (moved if expected == "moved" else dataset)


@pytest.mark.gpu
def test_place_moves_a_small_data_set_to_the_gpu() -> None:
    dataset = make_dataset()
    placed = dataset.placed("cuda")

    assert placed.images.is_cuda
    assert placed.labels.is_cuda
    assert placed.fingerprint() == dataset.fingerprint()
