"""What the package asks of a network: its file answers, and registers the answers."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Final, Protocol

from torch import nn

from dpsgd.config import ModelConfig
from dpsgd.errors import fault

__all__ = ["Architecture", "ModelBuilder", "Network"]

# Settings that are used around a network, whichever it is.
_OF_ALL: Final = ("name", "num_classes", "init_from", "init_weights")


class Network(nn.Module):
    """A network; it maps images (K, C, H, W) to logits, float32 or wider.

    The last layer is the module `classifier`: what it is given are the features.

    Attributes:
        draws_per_view: Uniform numbers in [0, 1) that a view takes in training: the
            second argument of `forward` is (K, draws_per_view) then, and missing in
            evaluation. 0 for a network that takes none.
        takes_one_size: Whether images must have the size that it was built for.
    """

    draws_per_view: int = 0
    takes_one_size: ClassVar[bool] = False


class ModelBuilder(Protocol):
    """Builds one architecture; the parameters are drawn by `initialize`."""

    def __call__(
        self,
        config: ModelConfig,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
    ) -> Network:
        """Returns the network of settings without faults."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What a file of this room registers in `MODELS`, and all that it registers.

    Attributes:
        build: Builds the network.
        uses: Names of the settings that it reads. All others are refused unless they
            have their default, so that none is ignored silently.
        faults: Returns why settings do not fit (C, H, W) images or each other, one line
            each; by default they always do.
        title: Returns what reports call the network of some settings, by default its
            name.
    """

    build: ModelBuilder
    uses: tuple[str, ...]
    faults: Callable[[ModelConfig, tuple[int, int, int]], list[str]] = (
        lambda config, image_shape: []
    )
    title: Callable[[ModelConfig], str] = lambda config: config.name

    def refusals(
        self, config: ModelConfig, image_shape: tuple[int, int, int]
    ) -> list[str]:
        """Returns all that is wrong with settings, one line each.

        Args:
            config: Settings of the network.
            image_shape: (C, H, W) of one image.
        """
        rule, remedy = f"{config.name} has no such setting", "remove it"
        unused = [
            fault(f"model.{one.name}", value, rule, remedy)
            for one in fields(config)
            if one.name not in (*_OF_ALL, *self.uses)
            and (value := getattr(config, one.name)) != one.default
        ]
        return unused + self.faults(config, image_shape)
