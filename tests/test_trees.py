import torch

from dpsgd.trees import num_elements, zeros_like


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
