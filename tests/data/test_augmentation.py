import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dpsgd.data.augmentation import ViewParameters, draw_views, make_views, normalize
from dpsgd.errors import ConfigError
from dpsgd.rng import RandomStreams

MEAN = (0.49, 0.48, 0.44)
STD = (0.24, 0.25, 0.26)


def random_images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def draw(
    num_examples: int,
    augmentation: str = "crop_flip",
    *,
    padding: int = 4,
    multiplicity: int = 3,
    step: int = 0,
) -> ViewParameters:
    return draw_views(
        RandomStreams.from_seed(0).generator("augmentation", step),
        num_examples,
        augmentation=augmentation,
        crop_padding=padding,
        augmentation_multiplicity=multiplicity,
    )


def slow_views(images: Tensor, parameters: ViewParameters) -> np.ndarray:
    """Pads, crops and flips one view at a time, as NumPy does it."""
    num_examples, num_views = parameters.flips.shape
    _, height, width = images.shape[1:]
    padding = parameters.padding
    mean = np.array(MEAN)[:, None, None]
    std = np.array(STD)[:, None, None]
    views = np.empty((num_examples, num_views, *images.shape[1:]))
    for m, k in itertools.product(range(num_examples), range(num_views)):
        pixels = (images[m].numpy() / 255 - mean) / std
        edges = ((0, 0), (padding, padding), (padding, padding))
        padded = np.pad(pixels, edges, mode="symmetric")
        top, left = parameters.offsets[m, k].tolist()
        view = padded[:, top : top + height, left : left + width]
        views[m, k] = view[:, :, ::-1] if parameters.flips[m, k] else view
    return views


@pytest.mark.parametrize("augmentation", ["none", "flip", "crop", "crop_flip"])
@pytest.mark.parametrize("padding", [0, 1, 4, 7])
def test_views_equal_the_slow_reference(augmentation: str, padding: int) -> None:
    images = random_images(5, 3, 9, 7)
    parameters = draw(5, augmentation, padding=padding, multiplicity=4)
    views = make_views(images, parameters, mean=MEAN, std=STD, dtype=torch.float64)

    assert views.is_contiguous()
    # The same float64 operations in the same order, up to one rounding each.
    np.testing.assert_allclose(views, slow_views(images, parameters), rtol=1e-14)


def test_padding_mirrors_with_the_edge_pixel() -> None:
    images = torch.tensor([[[[10, 20, 30]] * 3]], dtype=torch.uint8)
    corner = ViewParameters(
        offsets=torch.tensor([[[2, 0]]]), flips=torch.tensor([[False]]), padding=2
    )
    view = make_views(images, corner, mean=(0.0,), std=(1 / 255,))

    assert view[0, 0, 0, 0].round().tolist() == [20, 10, 10]


def test_views_are_uniform_over_crops_and_flips() -> None:
    parameters = draw(20_000, padding=1, multiplicity=2)
    rows, columns = parameters.offsets.unbind(-1)
    cells = (rows * 3 + columns) * 2 + parameters.flips
    counts = torch.bincount(cells.flatten(), minlength=18).numpy()

    assert stats.chisquare(counts).pvalue > 1e-4
    skewed = counts.copy()
    skewed[0] += counts[1] // 5
    assert stats.chisquare(skewed).pvalue < 1e-4


def test_views_of_an_example_and_of_its_neighbour_are_independent() -> None:
    parameters = draw(20_000, padding=1, multiplicity=2)
    cells = parameters.offsets[..., 0] * 2 + parameters.flips  # (R, K)

    def p_value(first: Tensor, second: Tensor) -> float:
        table = torch.bincount(first * 6 + second, minlength=36).reshape(6, 6)
        return float(stats.chi2_contingency(table.numpy()).pvalue)

    assert p_value(cells[:, 0], cells[:, 1]) > 1e-4
    assert p_value(cells[:-1, 1], cells[1:, 0]) > 1e-4
    # A tenth of the examples with two equal views would be noticed.
    copied = torch.where(torch.arange(20_000) % 10 == 0, cells[:, 0], cells[:, 1])
    assert p_value(cells[:, 0], copied) < 1e-12


def test_row_and_column_offsets_and_flips_cover_their_whole_range() -> None:
    parameters = draw(5_000, padding=2)

    assert parameters.offsets[..., 0].unique().tolist() == [0, 1, 2, 3, 4]
    assert parameters.offsets[..., 1].unique().tolist() == [0, 1, 2, 3, 4]
    assert parameters.flips.unique().tolist() == [False, True]


@pytest.mark.parametrize("augmentation", ["flip", "crop", "crop_flip"])
def test_appending_an_example_leaves_the_views_of_the_others(augmentation: str) -> None:
    for num_examples in range(6):
        fewer = draw(num_examples, augmentation)
        more = draw(num_examples + 1, augmentation)
        assert torch.equal(fewer.offsets, more.offsets[:-1])
        assert torch.equal(fewer.flips, more.flips[:-1])


def test_steps_have_different_views() -> None:
    assert not torch.equal(draw(50).offsets, draw(50, step=1).offsets)


@pytest.mark.parametrize("augmentation", ["none", "flip", "crop", "crop_flip"])
def test_only_what_the_augmentation_names_is_drawn(augmentation: str) -> None:
    parameters = draw(200, augmentation)

    assert parameters.offsets.any() == ("crop" in augmentation)
    assert parameters.flips.any() == ("flip" in augmentation)
    assert parameters.padding == (4 if "crop" in augmentation else 0)


def test_without_augmentation_every_view_is_the_normalised_image() -> None:
    images = random_images(4, 3, 2, 2)
    # The padding is larger than the image, and unused.
    views = make_views(images, draw(4, "none", padding=9), mean=MEAN, std=STD)
    expected = normalize(images, mean=MEAN, std=STD)

    assert views.shape == (4, 3, 3, 2, 2)
    for k in range(3):
        assert torch.equal(views[:, k], expected)


def test_views_do_not_depend_on_the_microbatch_size() -> None:
    images = random_images(7, 3, 8, 8)
    parameters = draw(7)
    whole = make_views(images, parameters, mean=MEAN, std=STD)
    for size in (1, 2, 3, 7):
        parts = [
            make_views(
                images[start : start + size],
                parameters.microbatch(start, min(size, 7 - start)),
                mean=MEAN,
                std=STD,
            )
            for start in range(0, 7, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_microbatch_past_the_end_is_padded_with_zeros() -> None:
    parameters = draw(5)
    part = parameters.microbatch(3, 4)

    assert torch.equal(part.offsets[:2], parameters.offsets[3:])
    assert torch.equal(part.flips[:2], parameters.flips[3:])
    assert not part.offsets[2:].any()
    assert not part.flips[2:].any()
    assert part.flips.shape == (4, 3)
    assert part.padding == 4
    assert make_views(random_images(4, 1, 8, 8), part, mean=(0.5,), std=(0.5,)).shape


def test_an_empty_draw_has_no_views() -> None:
    parameters = draw(0)
    views = make_views(random_images(0, 3, 8, 8), parameters, mean=MEAN, std=STD)

    assert views.shape == (0, 3, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_views_have_the_dtype_asked_for_and_round_once(dtype: torch.dtype) -> None:
    images = random_images(3, 3, 8, 8)
    parameters = draw(3)
    views = make_views(images, parameters, mean=MEAN, std=STD, dtype=dtype)
    exact = make_views(images, parameters, mean=MEAN, std=STD, dtype=torch.float64)

    assert views.dtype == dtype
    # One rounding to `dtype`, and in float32 the few of the formula.
    torch.testing.assert_close(
        views.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6
    )


def test_one_constant_stands_for_all_channels() -> None:
    images = random_images(2, 3, 4, 4)
    one = normalize(images, mean=(0.4,), std=(0.2,))
    three = normalize(images, mean=(0.4,) * 3, std=(0.2,) * 3)

    assert torch.equal(one, three)


def test_views_compile_without_a_graph_break() -> None:
    images = random_images(4, 3, 8, 8)
    parameters = draw(4)
    compiled = torch.compile(make_views, backend="eager", fullgraph=True)

    views = compiled(images, parameters, mean=MEAN, std=STD)
    assert torch.equal(views, make_views(images, parameters, mean=MEAN, std=STD))


@pytest.mark.gpu
def test_views_are_the_same_on_the_gpu() -> None:
    images = random_images(16, 3, 32, 32)
    parameters = draw(16, multiplicity=4)
    on_gpu = make_views(images.cuda(), parameters.to("cuda"), mean=MEAN, std=STD)

    on_cpu = make_views(images, parameters, mean=MEAN, std=STD)
    assert torch.equal(on_gpu.cpu(), on_cpu)


def test_constants_that_do_not_fit_the_channels_are_refused() -> None:
    images = random_images(2, 3, 4, 4)
    with pytest.raises(ConfigError, match=r"data\.mean=\[0\.1, 0\.2\]: must have one"):
        normalize(images, mean=(0.1, 0.2), std=(0.5,))
    with pytest.raises(ConfigError, match=r"data\.std=.*each of 3 channels; change"):
        make_views(images, draw(2, "none"), mean=(0.5,), std=(0.5,) * 4)


def test_padding_beyond_the_side_of_the_image_is_refused() -> None:
    images = random_images(2, 1, 4, 6)
    make_views(images, draw(2, "crop", padding=4), mean=(0.5,), std=(0.5,))
    with pytest.raises(ConfigError, match=r"data\.crop_padding=5: must be at most .*4"):
        make_views(images, draw(2, "crop", padding=5), mean=(0.5,), std=(0.5,))


def test_unknown_augmentation_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.augmentation=mixup: must be one of none"
    ):
        draw(2, "mixup")
