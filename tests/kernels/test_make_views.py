"""The views against NumPy's padding, one at a time; Triton is interpreted on a CPU."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dpsgd.kernels.make_views import (
    make_views,
    make_views_reference,
    make_views_triton,
)

Kernel = Callable[..., Tensor]
# More than one program of 1024 pixels, exactly one, less than one; one pixel.
SHAPES = [(3, 19, 21), (1, 32, 32), (3, 9, 7), (2, 1, 5), (4, 1, 1)]


@pytest.fixture(params=["reference", "triton"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    if request.param == "reference":
        return make_views_reference
    pytest.importorskip("triton")
    return make_views_triton


def case(
    shape: tuple[int, ...],
    padding: int,
    *,
    num_examples: int = 3,
    num_views: int = 2,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(padding)
    views = (num_examples, num_views)
    return {
        "images": torch.randint(
            0, 256, (num_examples, *shape), generator=generator, dtype=torch.uint8
        ),
        "levels": torch.randn(shape[0], 256, generator=generator).to(dtype),
        "offsets": torch.randint(2 * padding + 1, (*views, 2), generator=generator),
        "flips": torch.rand(views, generator=generator) < 0.5,
    }


def run(
    kernel: Kernel, tensors: dict[str, Tensor], padding: int, device: torch.device
) -> Tensor:
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    return kernel(
        on_device.pop("images"), on_device.pop("levels"), **on_device, padding=padding
    )


def one_by_one(tensors: dict[str, Tensor], padding: int) -> np.ndarray:
    """Pads, crops and flips as NumPy does it, then looks every pixel up."""
    images, levels = tensors["images"].numpy(), tensors["levels"].double().numpy()
    num_examples, channels, height, width = images.shape
    num_views = tensors["flips"].shape[1]
    views = np.empty((num_examples, num_views, channels, height, width))
    edges = ((0, 0), (padding, padding), (padding, padding))
    for m, k in itertools.product(range(num_examples), range(num_views)):
        padded = np.pad(images[m], edges, mode="symmetric")
        top, left = tensors["offsets"][m, k].tolist()
        view = padded[:, top : top + height, left : left + width]
        view = view[:, :, ::-1] if tensors["flips"][m, k] else view
        views[m, k] = [levels[c][view[c]] for c in range(channels)]
    return views


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_those_of_numpy_to_the_last_bit(
    kernel: Kernel,
    kernel_device: torch.device,
    shape: tuple[int, int, int],
    padding: int,
    dtype: torch.dtype,
) -> None:
    padding = min(padding, *shape[1:])
    tensors = case(shape, padding, dtype=dtype)
    views = run(kernel, tensors, padding, kernel_device)

    assert views.dtype == dtype
    assert views.shape == (3, 2, *shape)
    np.testing.assert_array_equal(
        views.double().cpu().numpy(), one_by_one(tensors, padding)
    )


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("size", [(5, 4), (9, 7), (1, 1)])
def test_smaller_views_are_cut_where_they_lie(
    kernel: Kernel, kernel_device: torch.device, size: tuple[int, int], padding: int
) -> None:
    tensors = case((3, 9, 7), padding)
    room = 9 + 2 * padding - size[0], 7 + 2 * padding - size[1]
    for axis, most in enumerate(room):  # every offset from none to all there is
        tensors["offsets"][..., axis] = torch.linspace(0, most, 6).long().view(3, 2)
    tensors["flips"][0] = torch.tensor([True, False])
    at = {"padding": padding, "size": size}
    views = kernel(**{k: v.to(kernel_device) for k, v in tensors.items()}, **at).cpu()

    edges = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    padded = torch.from_numpy(np.pad(tensors["images"], edges, mode="symmetric"))
    for m, k in itertools.product(range(3), range(2)):
        top, left = tensors["offsets"][m, k].tolist()
        crop = padded[m, :, top : top + size[0], left : left + size[1]]
        crop = crop.flip(2) if tensors["flips"][m, k] else crop
        expected = [tensors["levels"][c][crop[c].long()] for c in range(3)]
        assert torch.equal(views[m, k], torch.stack(expected))


def test_every_corner_and_flip_is_cut(
    kernel: Kernel, kernel_device: torch.device
) -> None:
    tensors = case((3, 5, 4), 2, num_examples=1, num_views=50)
    codes = torch.arange(50)
    tensors["offsets"] = torch.stack([codes % 5, codes // 5 % 5], dim=1)[None]
    tensors["flips"] = (codes >= 25)[None]
    views = run(kernel, tensors, 2, kernel_device)

    np.testing.assert_array_equal(views.cpu().numpy(), one_by_one(tensors, 2))


@pytest.mark.parametrize("num_views", [1, 5])
@pytest.mark.parametrize("shape", [(3, 9, 7), (1, 8, 8)])
def test_views_of_the_kernel_are_channels_last_images(
    kernel_device: torch.device, shape: tuple[int, int, int], num_views: int
) -> None:
    pytest.importorskip("triton")
    tensors = case(shape, 1, num_views=num_views)
    views = run(make_views_triton, tensors, 1, kernel_device)
    images = views.flatten(0, 1)  # (M * K, C, H, W)

    assert images.data_ptr() == views.data_ptr()
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert views.clone().stride() == views.stride()


def test_images_in_another_layout_are_read_right(
    kernel: Kernel, kernel_device: torch.device
) -> None:
    tensors = case((3, 6, 5), 2)
    expected = one_by_one(tensors, 2)
    last = tensors["images"].contiguous(memory_format=torch.channels_last)
    tensors["images"] = last

    views = run(kernel, tensors, 2, kernel_device)
    np.testing.assert_array_equal(views.cpu().numpy(), expected)


@pytest.mark.parametrize(("examples", "views"), [(0, 3), (3, 0)])
def test_nothing_drawn_gives_no_views(
    kernel: Kernel, kernel_device: torch.device, examples: int, views: int
) -> None:
    tensors = case((3, 6, 5), 2, num_examples=examples, num_views=views)

    assert run(kernel, tensors, 2, kernel_device).shape == (examples, views, 3, 6, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_views_on_a_gpu_are_those_of_the_cpu_to_the_last_bit(
    dtype: torch.dtype,
) -> None:
    tensors = case((3, 32, 32), 4, num_examples=64, num_views=16, dtype=dtype)
    on_gpu = run(make_views, tensors, 4, torch.device("cuda"))

    on_cpu = run(make_views, tensors, 4, torch.device("cpu"))
    assert torch.equal(on_gpu.cpu(), on_cpu)
