"""Names and layout of the Wide-ResNets that De et al. 2022 published in JAX.

Their checkpoints are pickled, and unpickling runs code, so they are converted once, by
whoever trusts them, to arrays by haiku name:

    python -c "import dill, numpy; p = dill.load(open('X.dill', 'rb'))['params'];
    numpy.savez('X.npz', **{f'{m}/{n}': a for m, v in p.items() for n, a in v.items()})"

Source: the reference code, https://github.com/google-deepmind/jax_privacy, classes
`WideResNet` and `WSConv2D`.
"""

import re

from torch import Tensor

from dpsgd.trees import Params

__all__ = ["from_jax_wide_resnet"]

_MODULES = (
    (r"First_conv", "stem"),
    (r"Block_(\d)_skip_norm", "stages.{0}.0.shortcut.0"),
    (r"Block_(\d)_skip_conv", "stages.{0}.0.shortcut.1"),
    (r"Block_(\d)_norm_(\d+)_0", "stages.{0}.{1}.residual.0"),
    (r"Block_(\d)Conv_(\d+)_0", "stages.{0}.{1}.residual.1"),
    (r"Block_(\d)_norm_(\d+)_1", "stages.{0}.{1}.residual.2"),
    (r"Block_(\d)Conv_(\d+)_1", "stages.{0}.{1}.last"),
    (r"Final_norm", "head_activation"),
    (r"Softmax", "classifier"),
)
_LEAVES = {"w": "weight", "b": "bias", "scale": "weight", "offset": "bias"}


def from_jax_wide_resnet(tensors: Params) -> Params:
    """Returns the tensors of a published Wide-ResNet under our names, in our layout.

    Args:
        tensors: By haiku name, such as `wide_res_net/Block_1Conv_0_0/w`. Names that
            the network does not have are kept as they are.
    """
    found = {}
    for full_name, leaf in tensors.items():
        *_, module, kind = ["", *full_name.split("/")]
        name = f"{_module(module) or module}.{_LEAVES.get(kind, kind)}"
        found[name] = _in_our_layout(kind, leaf)
    return found


def _module(name: str) -> str | None:
    """Returns our name of a haiku module."""
    for pattern, ours in _MODULES:
        match = re.fullmatch(pattern, name)
        if match:
            stage, *block = match.groups() or ("1",)
            return ours.format(int(stage) - 1, *block)
    return None


def _in_our_layout(kind: str, leaf: Tensor) -> Tensor:
    """Returns a leaf with output channels first."""
    if kind == "w" and leaf.ndim == 4:
        return leaf.permute(3, 0, 1, 2)  # (KH, KW, I, O) -> (O, KH, KW, I)
    if kind == "w":
        return leaf.T  # (I, O) -> (O, I)
    return leaf.flatten()
