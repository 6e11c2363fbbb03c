"""Names and layout of the NFNets that timm converted from the published weights.

timm's `nf_resnet50` is not here: it halves shortcuts by average pooling, which is
another network than the published one.

Source: timm's `dm_nfnet_f0` to `dm_nfnet_f6`, module timm.models.nfnet.
"""

import re

from torch import Tensor

from dpsgd.trees import Params

__all__ = ["from_timm_nfnet", "with_our_standardization"]

_BLOCK = r"stages\.(\d+)\.(\d+)"
_NAMES = (
    (r"stem\.conv1", "stem.0"),
    (r"stem\.conv2", "stem.1"),
    (r"stem\.conv3", "stem.2"),
    (r"stem\.conv4", "stem.3"),
    (rf"{_BLOCK}\.conv1", "stages.{0}.{1}.branch.0"),
    (rf"{_BLOCK}\.conv2", "stages.{0}.{1}.branch.1"),
    (rf"{_BLOCK}\.conv2b", "stages.{0}.{1}.branch.2"),
    (rf"{_BLOCK}\.conv3", "stages.{0}.{1}.branch.3"),
    (rf"{_BLOCK}\.downsample\.conv", "stages.{0}.{1}.projection"),
    (rf"{_BLOCK}\.attn_last\.fc1", "stages.{0}.{1}.squeeze_excite.reduce"),
    (rf"{_BLOCK}\.attn_last\.fc2", "stages.{0}.{1}.squeeze_excite.expand"),
    (r"final_conv", "head_conv"),
    (r"head\.fc", "classifier"),
)
_SKIP_GAIN = "skipinit_gain"
_THEIR_EPS = 1e-5  # added to the variance
_OUR_EPS = 1e-4  # the squared norm is at least this


def from_timm_nfnet(tensors: Params) -> Params:
    """Returns the tensors of a timm NFNet under our names, in our layout.

    Args:
        tensors: By timm's name. Names that the network does not have are kept.
    """
    found = {}
    for name, leaf in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == _SKIP_GAIN:
            found[f"{module}.skip_gain.value"] = leaf
        elif f"{module}.gain" in tensors:
            weight = tensors[f"{module}.weight"]
            found[f"{_module(module)}.{kind}"] = _of_convolution(kind, leaf, weight)
        else:  # of a linear layer, which timm may write as a 1x1 convolution
            plain = leaf.flatten(1) if leaf.ndim == 4 else leaf
            found[f"{_module(module)}.{kind}"] = plain
    return found


def with_our_standardization(gain: Tensor, weight: Tensor) -> Tensor:
    """Returns the gains with which our standardised weights are timm's.

    Args:
        gain: (O, 1, 1, 1) gains there, for unit fan-in.
        weight: (O, I, KH, KW) raw weights.

    Returns:
        (O,) gains here.
    """
    rows = weight.flatten(1).double()
    fan_in, variance = rows.shape[1], rows.var(1, correction=0)
    ours = (variance * fan_in).clamp(min=_OUR_EPS).rsqrt()
    theirs = ((variance + _THEIR_EPS) * fan_in).rsqrt()
    return (gain.flatten().double() * theirs / ours).to(gain.dtype)


def _module(name: str) -> str:
    """Returns our name of a module, or the same where we have none."""
    for pattern, ours in _NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return ours.format(*match.groups())
    return name


def _of_convolution(kind: str, leaf: Tensor, weight: Tensor) -> Tensor:
    """Returns a leaf of a convolution with standardised weights, in our layout."""
    if kind == "weight":
        return leaf.permute(0, 2, 3, 1).contiguous()  # (O, I, KH, KW) -> (O, KH, KW, I)
    if kind == "gain":
        return with_our_standardization(leaf, weight)
    return leaf
