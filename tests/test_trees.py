import hashlib

import pytest
import torch

from dpsgd.trees import all_finite, num_elements, sha256, zeros_like


def test_elements_of_all_leaves_are_counted() -> None:
    leaves = {"w": torch.ones(2, 3), "scalar": torch.tensor(1.0), "no": torch.ones(0)}

    assert num_elements(leaves) == 7
    assert num_elements({}) == 0


def test_zeros_are_float32_in_the_shape_and_order_of_the_leaves() -> None:
    leaves = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.ones(3, 1).double()}
    zeros = zeros_like(leaves)

    assert list(zeros) == ["b", "a"]
    for name, leaf in zeros.items():
        assert leaf.dtype == torch.float32
        assert leaf.shape == leaves[name].shape
        assert not leaf.any()
    assert zeros_like({}) == {}


def test_zeros_share_no_memory_with_the_leaves() -> None:
    leaves = {"w": torch.ones(2)}
    zeros_like(leaves)["w"] += 5

    assert leaves["w"].tolist() == [1, 1]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("others", [1.0, 3e38])
def test_one_element_that_is_not_finite_is_found(value: float, others: float) -> None:
    leaves = {"a": torch.ones(3), "b": torch.full((2, 5), others), "c": torch.ones(0)}

    assert all_finite(leaves)  # although the norm of 3e38 is not
    leaves["b"][1, 3] = value
    assert not all_finite(leaves)


def test_a_digest_is_of_names_dtypes_shapes_and_bytes() -> None:
    values = torch.tensor([[1.0, -0.0], [2.0, 3.0]])
    told = b"w torch.float32 (2, 2)" + values.numpy().tobytes()
    leaves = [
        values,
        values[[1, 0]],
        values.abs(),
        values.flatten(),
        values.view(torch.int32),
        values.bfloat16(),
        torch.tensor(1.0),
        torch.ones(0, 3),
    ]

    assert sha256({"w": values}) == hashlib.sha256(told).hexdigest()
    assert sha256({"w": values.T.contiguous().T}) == sha256({"w": values})
    digests = {sha256({name: leaf}) for name in ("w", "v") for leaf in leaves}
    assert len(digests) == 2 * len(leaves)
