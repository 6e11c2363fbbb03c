"""Views that are mixed of two views of one example, and of nothing else."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dpsgd.config import DataConfig
from dpsgd.data import ImageDataset, ViewLoader
from dpsgd.data.mixtures import draw_mixtures, mix_views
from dpsgd.rng import RandomStreams

STREAMS = RandomStreams.from_seed(0)


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (20, 3, 6, 5), generator=generator)
    return drawn.to(torch.uint8)


def views_of(
    draw: list[int],
    *,
    of: Tensor | None = None,
    mixed: int = 3,
    multiplicity: int = 7,
    microbatch_size: int = 4,
    dtype: torch.dtype = torch.float64,
    fixed: bool = False,
    step: int = 7,
) -> Tensor:
    """The views that a loader makes of a draw."""
    loader = ViewLoader(
        ImageDataset(images=images() if of is None else of, labels=torch.arange(20)),
        config=DataConfig(
            source="digits",
            augmentation="crop_flip",
            crop_padding=2,
            augmentation_multiplicity=multiplicity,
            mixed_views=mixed,
            fixed_views=fixed,
        ),
        streams=STREAMS,
        microbatch_size=microbatch_size,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    parts = list(loader(np.array(draw, np.int64), step))
    return torch.cat([views[mask] for views, _, mask in parts])


def drawn(num_examples: int, *, num_views: int = 4, num_mixed: int = 3) -> Tensor:
    rng = STREAMS.generator("mixing", 7)
    return draw_mixtures(rng, num_examples, num_views=num_views, num_mixed=num_mixed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_views_are_the_plain_ones_and_mixtures_of_two_of_them(
    dtype: torch.dtype,
) -> None:
    draw = [0, 3, 8, 9, 17]
    views = views_of(draw, dtype=dtype)
    plain = views_of(draw, mixed=0, multiplicity=4, dtype=dtype)

    assert views.shape == (5, 7, 3, 6, 5)
    assert torch.equal(views[:, :4], plain)
    for m, row in enumerate(drawn(5).tolist()):
        for x, (first, second, weight) in enumerate(row):
            a, b = plain[m, int(first)].double(), plain[m, int(second)].double()
            expected = weight * a + (1 - weight) * b
            # One rounding to the type; a float32 weight and sum before it.
            torch.testing.assert_close(
                views[m, 4 + x].double(),
                expected,
                rtol=0,
                atol={torch.float64: 1e-15, torch.float32: 1e-6}.get(dtype, 4e-3),
            )


def test_the_views_of_an_example_follow_from_it_alone() -> None:
    draw = [0, 3, 8, 9, 17]
    changed = images()
    changed[8] = 255 - changed[8]
    before, after = views_of(draw), views_of(draw, of=changed)

    others = [0, 1, 3, 4]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[2], after[2])
    # Its own mixtures do change: they are made of it.
    assert (before[2, 4:] != after[2, 4:]).any()


def test_appending_an_example_leaves_the_views_of_the_others() -> None:
    whole = views_of([0, 3, 8, 9, 17])

    for size in range(1, 5):
        assert torch.equal(views_of([0, 3, 8, 9, 17][:size]), whole[:size])
    assert torch.equal(views_of([0, 3, 8, 9, 17], microbatch_size=2), whole)


def test_steps_mix_otherwise_unless_views_are_fixed() -> None:
    assert not torch.equal(views_of([3])[:, 4:], views_of([3], step=8)[:, 4:])
    fixed = views_of([3, 5], fixed=True)
    assert torch.equal(fixed[:1], views_of([3, 9], fixed=True, step=8)[:1])


def test_pairs_are_uniform_and_never_of_one_view() -> None:
    mixtures = drawn(20_000, num_views=3)
    first, second = mixtures[..., 0].long(), mixtures[..., 1].long()
    counts = torch.bincount((3 * first + second).flatten(), minlength=9).reshape(3, 3)

    assert counts.diagonal().tolist() == [0, 0, 0]
    # 60,000 draws over 6 pairs: 5 standard deviations of 91.
    assert (counts + 10_000 * torch.eye(3) - 10_000).abs().max() < 460
    weights = mixtures[..., 2]
    assert weights.min() >= 0
    assert weights.max() < 1
    assert abs(weights.mean() - 0.5) < 5 * (1 / 12 / 60_000) ** 0.5
    assert abs(torch.corrcoef(torch.stack([weights, first]).flatten(1))[0, 1]) < 0.02


def test_no_examples_have_no_mixtures() -> None:
    views = torch.zeros(0, 4, 3, 6, 5)

    assert drawn(0).shape == (0, 3, 3)
    assert mix_views(views, drawn(0)).shape == (0, 7, 3, 6, 5)
