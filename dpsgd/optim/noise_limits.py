"""How large noise may be: beyond, no number of its kind holds it."""

from typing import Final

from dpsgd.errors import ConfigError, fault
from dpsgd.optim.rounded_gaussian import MAX_STD
from dpsgd.optim.secure_noise import SecureNoise
from dpsgd.privacy import DPSGDMechanism

__all__ = ["check_noise"]

_MAX_NOISE_STD: Final = 2.0**120  # a draw of 2**7 standard deviations is float32


def check_noise(
    mechanism: DPSGDMechanism, *, num_parameters: int, clipping_slack: float | None
) -> None:
    """Raises unless the noise of a mechanism can be drawn and added.

    Args:
        mechanism: Says how much noise there is.
        num_parameters: Coordinates d of the sum, >= 1.
        clipping_slack: As for `SecureNoise.for_sums`; None for standard noise.

    Raises:
        ConfigError: Its standard deviation is past float32, or past the grid of secure
            noise.
    """
    noise, std = mechanism.noise_multiplier, mechanism.noise_std
    if std > _MAX_NOISE_STD:
        rule = f"the noise's standard deviation of {std:g} must be at most 2**120"
        is_multiplier = mechanism.l2_sensitivity <= noise
        name = "noise_multiplier" if is_multiplier else "clipping_norm"
        value = noise if is_multiplier else mechanism.clipping_norm
        remedy = "lower it" if is_multiplier else "set privacy.rescale_to_unit_norm"
        raise ConfigError(fault(f"privacy.{name}", value, rule, remedy))
    if clipping_slack is None:
        return
    secure = SecureNoise.for_sums(
        mechanism, num_parameters=num_parameters, clipping_slack=clipping_slack
    )
    if secure.std > MAX_STD:
        most = noise * MAX_STD / secure.std
        rule = f"secure noise for {num_parameters:,} parameters must be at most about"
        remedy = "lower it, or take privacy.noise=standard"
        name = "privacy.noise_multiplier"
        raise ConfigError(fault(name, noise, f"{rule} {most:.3g}", remedy))
