"""What a tape records is what per-sample gradients are made of, and is all of it."""

import threading
from collections.abc import Callable

import pytest
import torch
from small_network import (
    Params,
    assert_near,
    expected_grads,
    images_and_labels,
    loss,
    parameters,
)
from torch import Tensor
from torch.func import vmap

from dpsgd.kernels.conv_weight_grad import conv_weight_grad_reference
from dpsgd.kernels.tape import (
    ConvRecord,
    LinearRecord,
    Record,
    RowsRecord,
    Tape,
    active_tape,
)
from dpsgd.kernels.weight_standardization import unstandardize_reference_


def backward(
    params: Params, images: Tensor, labels: Tensor
) -> tuple[list[Record], list[Tensor | None]]:
    """Records and autograd's gradients of one backward pass over all examples."""
    trained = [leaf for leaf in params.values() if leaf.requires_grad]
    with Tape() as tape:
        losses = vmap(loss, (None, 0, 0))(params, images, labels)
        assert tape.records == []  # the forward pass leaves none
        grads = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
    return tape.records, list(grads)


def leaves_of(record: Record) -> list[Tensor]:
    if isinstance(record, RowsRecord):
        return [record.leaf]
    if isinstance(record, ConvRecord) and record.standardization is not None:
        return [record.weight, record.standardization.gain]
    return [record.weight]


def grads_of(record: Record, num_examples: int) -> list[Tensor]:
    """Forms the gradients (M, ...) of what `leaves_of` returns."""
    if isinstance(record, RowsRecord):
        return [record.grads.unflatten(0, (num_examples, -1)).sum(1)]
    x, grad_y = (
        one.unflatten(0, (num_examples, -1)) for one in (record.x, record.grad_y)
    )
    if isinstance(record, LinearRecord):
        return [torch.einsum("mki,mko->moi", x, grad_y)]
    grads = conv_weight_grad_reference(x, grad_y, record.geometry)
    if record.standardization is None:
        return [grads]
    gain_grads = unstandardize_reference_(grads, record.standardization)
    return [grads, gain_grads]


def case(device: torch.device) -> tuple[Params, Tensor, Tensor]:
    params = parameters(device)
    for leaf in params.values():
        leaf.requires_grad_()
    return params, *images_and_labels(device)


@pytest.mark.parametrize("implementation", ["references", "kernels"])
def test_records_make_up_the_per_sample_gradients(
    implementation: str, on_kernels: Callable[[], None], kernel_device: torch.device
) -> None:
    if implementation == "kernels":
        on_kernels()
    params, images, labels = case(kernel_device)
    records, _ = backward(params, images, labels)
    names = {leaf.data_ptr(): name for name, leaf in params.items()}
    found = {
        names[leaf.data_ptr()]: grads
        for record in records
        for leaf, grads in zip(leaves_of(record), grads_of(record, 3), strict=True)
    }

    assert sum(len(leaves_of(record)) for record in records) == len(params)
    assert_near(found, expected_grads(params, images, labels))


def test_autograd_forms_no_gradient_of_what_is_recorded() -> None:
    _, grads = backward(*case(torch.device("cpu")))

    assert grads == [None] * len(grads)


def test_records_come_in_the_order_of_the_backward_pass() -> None:
    params, images, labels = case(torch.device("cpu"))
    records, _ = backward(params, images, labels)
    names = {leaf.data_ptr(): name for name, leaf in params.items()}
    weights = [
        (type(record), names[record.weight.data_ptr()])
        for record in records
        if not isinstance(record, RowsRecord)
    ]

    # The shortcut and the block's convolution do not wait for each other.
    assert weights[0] == (LinearRecord, "classifier")
    assert set(weights[1:3]) == {(ConvRecord, "shortcut"), (ConvRecord, "tiny")}
    assert weights[3:] == [(ConvRecord, "stem")]


def test_frozen_parameters_are_not_recorded() -> None:
    params, images, labels = case(torch.device("cpu"))
    frozen = {"stem", "stem_gain", "scale", "shortcut_bias", "shortcut", "classifier"}
    for name in frozen:
        params[name].requires_grad_(False)
    records, _ = backward(params, images, labels)
    names = {leaf.data_ptr(): name for name, leaf in params.items()}
    recorded = {
        names[leaf.data_ptr()] for record in records for leaf in leaves_of(record)
    }

    assert recorded == set(params) - frozen


def test_without_a_tape_autograd_forms_all_gradients() -> None:
    params, images, labels = case(torch.device("cpu"))
    backward(params, images, labels)
    losses = vmap(loss, (None, 0, 0))(params, images, labels)
    grads = torch.autograd.grad(losses.sum(), list(params.values()))
    expected = expected_grads(params, images, labels)

    assert_near(
        dict(zip(params, grads, strict=True)),
        {name: rows.sum(0) for name, rows in expected.items()},
    )


def test_tapes_do_not_nest() -> None:
    with Tape() as outer:
        with pytest.raises(AssertionError, match="within another"), Tape():
            pass
        assert active_tape() is outer
    assert active_tape() is None


def test_a_tape_is_closed_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), Tape():
        raise RuntimeError("out of memory")

    assert active_tape() is None
    with Tape() as tape:  # and another one may begin
        assert active_tape() is tape


def test_threads_of_autograd_see_the_tape() -> None:
    seen = []
    with Tape() as tape:
        thread = threading.Thread(target=lambda: seen.append(active_tape()))
        thread.start()
        thread.join()

    assert seen == [tape]
