"""What reaches the device: every drawn example in its views, and nothing twice."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dpsgd.data.batches
from dpsgd.config import DataConfig
from dpsgd.data import ImageDataset, ViewLoader, draw_views, make_views
from dpsgd.data.dataset import upload
from dpsgd.errors import ConfigError
from dpsgd.rng import RandomStreams

STREAMS = RandomStreams.from_seed(0)
CONFIG = DataConfig(
    source="digits",
    mean=(0.49, 0.48, 0.44),
    std=(0.24, 0.25, 0.26),
    augmentation="crop_flip",
    crop_padding=2,
    augmentation_multiplicity=3,
)


def dataset() -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 6, 5), generator=generator)
    return ImageDataset(images=images.to(torch.uint8), labels=torch.arange(20))


def loader(**changes: Any) -> ViewLoader:
    settings = {"microbatch_size": 4, "dtype": torch.float32, **changes}
    return ViewLoader(
        dataset(),
        config=settings.pop("config", CONFIG),
        streams=STREAMS,
        device=torch.device("cpu"),
        **settings,
    )


def load(draw: list[int], step: int = 7, **changes: Any) -> list[tuple[Tensor, ...]]:
    return list(loader(**changes)(np.array(draw, np.int64), step))


@pytest.mark.parametrize("draw", [[3], [0, 2, 9, 19], list(range(1, 12))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded_to", [None, 2])
def test_every_drawn_example_comes_once_in_the_views_of_its_step(
    draw: list[int], dtype: torch.dtype, padded_to: int | None
) -> None:
    parts = load(draw, dtype=dtype, padded_to=padded_to)
    mask = torch.cat([mask for _, _, mask in parts])
    views = torch.cat([views for views, _, _ in parts])[mask]
    labels = torch.cat([labels for _, labels, _ in parts])[mask]
    expected = make_views(
        dataset().images[draw],
        draw_views(
            STREAMS.generator("augmentation", 7),
            len(draw),
            augmentation="crop_flip",
            crop_padding=2,
            augmentation_multiplicity=3,
        ),
        mean=CONFIG.mean,
        std=CONFIG.std,
        dtype=dtype,
    )

    sizes = [len(mask) for _, _, mask in parts]
    assert sizes[:-1] == [4] * (len(parts) - 1)
    assert sizes[-1] == (2 if padded_to == 2 and len(draw) % 4 in (1, 2) else 4)
    assert mask.tolist() == [True] * len(draw) + [False] * (len(mask) - len(draw))
    assert labels.tolist() == draw
    assert torch.equal(views, expected)


def test_an_empty_draw_yields_nothing() -> None:
    assert load([]) == []
    assert load([], draws_per_view=2) == []


def uniforms_of(draw: list[int], **changes: Any) -> Tensor:
    parts = load(draw, draws_per_view=5, **changes)
    return torch.cat([uniforms[mask] for _, _, uniforms, mask in parts])


def test_uniform_draws_follow_from_the_step_and_the_place_in_the_draw() -> None:
    whole = uniforms_of([1, 4, 7, 9, 15, 18])

    assert whole.shape == (6, 3, 5)
    assert whole.dtype == torch.float32
    assert 0 <= whole.min() < 0.1
    assert 0.9 < whole.max() < 1
    assert len(whole.unique()) == whole.numel()  # no view shares another's
    for changes in ({"microbatch_size": 1}, {"padded_to": 2}, {"dtype": torch.float64}):
        assert torch.equal(uniforms_of([1, 4, 7, 9, 15, 18], **changes), whole)
    assert torch.equal(uniforms_of([2, 4, 7]), whole[:3])
    assert not torch.equal(uniforms_of([2, 4, 7], step=8), whole[:3])


@pytest.mark.parametrize("cuts", [[0, 9], [0, 4, 9], [0, 0, 1, 9, 9]])
def test_the_shares_of_a_draw_are_the_draw(cuts: list[int]) -> None:
    draw, how = list(range(3, 12)), {"draws_per_view": 2}
    shares = [
        load(draw, share=lambda count, own=slice(*pair): own, **how)
        for pair in itertools.pairwise(cuts)
    ]

    def used(parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
        mask = torch.cat([part[-1] for part in parts])
        return [torch.cat(column)[mask] for column in list(zip(*parts, strict=True))]

    together = used([part for share in shares for part in share])
    for found, expected in zip(together, used(load(draw, **how)), strict=True):
        assert torch.equal(found, expected)  # views, labels, uniform numbers


def test_uniform_draws_change_no_view() -> None:
    draw = [1, 4, 7, 9, 15]
    plain, with_draws = load(draw), load(draw, draws_per_view=5)

    for (views, labels, mask), found in zip(plain, with_draws, strict=True):
        assert torch.equal(views, found[0])
        assert torch.equal(labels, found[1])
        assert torch.equal(mask, found[-1])


def test_what_a_step_draws_is_uploaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, ...]] = []

    def counted(tensor: Tensor, device: torch.device) -> Tensor:
        sent.append(tuple(tensor.shape))
        return upload(tensor, device)

    monkeypatch.setattr(dpsgd.data.batches, "upload", counted)
    monkeypatch.setattr("dpsgd.data.augmentation.upload", counted)
    monkeypatch.setattr("dpsgd.data.dataset.upload", counted)
    load_views = loader(draws_per_view=2)
    counts = []
    for size in (4, 20):
        sent.clear()
        list(load_views(np.arange(size), 0))
        images = [shape for shape in sent if len(shape) == 4]
        assert len(images) == size // 4  # gathered on the device, if they lie there
        counts.append(len(sent) - len(images))

    # Rows, labels, mask, offsets, flips and draws, however many microbatches.
    assert counts == [6, 6]


def test_constants_that_do_not_fit_are_refused_before_the_first_step() -> None:
    config = DataConfig(source="digits", mean=(0.1, 0.2))
    with pytest.raises(ConfigError, match=r"data\.mean=\[0\.1, 0\.2\]"):
        loader(config=config)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_a_step_never_waits_for_the_gpu(home: str) -> None:
    load_views = ViewLoader(
        dataset().to(home),
        config=CONFIG,
        streams=STREAMS,
        microbatch_size=4,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    expected = load(list(range(11)), dtype=torch.bfloat16)
    list(load_views(np.arange(11), 7))  # compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = list(load_views(np.arange(11), 7))
    finally:
        torch.cuda.set_sync_debug_mode("default")

    for part, other in zip(parts, expected, strict=True):
        for one, two in zip(part, other, strict=True):
            assert torch.equal(one.cpu(), two)
