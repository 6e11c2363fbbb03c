"""Named, counter-based random streams: every draw is a function of (key, name, step).

A stream has no state to save. What a step draws depends on the secret key, the
stream's name and the step number alone, so a resumed run repeats the interrupted
one, drawing more in one stream never shifts another, and the result does not
depend on the device, the microbatch size or the number of processes.

The generator is Philox (Salmon et al. 2011), which is statistically strong and not
cryptographic; the key is. Whoever holds the key can subtract the noise: a key from a
published seed, or a published checkpoint, voids the guarantee.
"""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

__all__ = ["RandomStreams", "StreamName"]

StreamName = Literal[
    "init",
    "sampling",
    "selection",
    "augmentation",
    "mixing",
    "stochastic_depth",
    "noise",
    "canaries",
]

_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class RandomStreams:
    """The independent random streams of one run.

    Args:
        key: 16 secret bytes from which every stream is derived.
        seeded: True if the key came from a seed that a person chose, so that the
            run can be repeated, and its noise removed, by anyone who knows the seed.
        noise_nonce: Secret bytes that enter the noise alone; empty in a run that was
            never resumed with other arithmetic.
    """

    key: bytes = field(repr=False)
    seeded: bool = False
    noise_nonce: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        if len(self.key) != _KEY_BYTES:
            raise ValueError(
                f"key of {len(self.key)} bytes: must have {_KEY_BYTES}; "
                "make streams with RandomStreams.from_seed"
            )

    @classmethod
    def from_seed(cls, seed: int | None = None) -> "RandomStreams":
        """Returns streams from a seed, or from the operating system's entropy.

        Args:
            seed: Any integer for a repeatable run that must not be released as
                private; None draws 128 bits from the operating system.
        """
        if seed is None:
            return cls(secrets.token_bytes(_KEY_BYTES), seeded=False)
        digest = hashlib.blake2b(str(seed).encode(), digest_size=_KEY_BYTES)
        return cls(digest.digest(), seeded=True)

    def to_dict(self) -> dict[str, str | bool]:
        """Returns the streams as JSON values: secret, like the key."""
        return {
            "key": self.key.hex(),
            "seeded": self.seeded,
            "noise_nonce": self.noise_nonce.hex(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "RandomStreams":
        """Returns the streams that `to_dict` described."""
        return cls(
            bytes.fromhex(state["key"]),
            seeded=state["seeded"],
            noise_nonce=bytes.fromhex(state["noise_nonce"]),
        )

    def with_new_noise(self) -> "RandomStreams":
        """Returns the same streams but for the noise, which no one has seen before."""
        return replace(self, noise_nonce=secrets.token_bytes(_KEY_BYTES))

    def generator(self, name: StreamName, step: int = 0) -> np.random.Generator:
        """Returns the generator of one stream at one step, always from its start.

        Args:
            name: Which stream.
            step: Step number, >= 0; each step owns 2**192 draws of the stream.
        """
        counter = [0, 0, 0, step]
        key = int.from_bytes(self._subkey(name), "little")
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def noise_key(self, step: int) -> int:
        """Returns the 64-bit Philox key of one step's noise.

        Each step has its own key, derived from the run's 128 bits, so that guessing one
        reveals one step's noise only.
        """
        return int.from_bytes(self._subkey("noise", step)[:8], "little")

    def _subkey(self, name: StreamName, step: int | None = None) -> bytes:
        """Derives the key of a stream, or of one step in it, from the run's key."""
        assert name in get_args(StreamName)
        message = name.encode()
        if step is not None:
            message += f"/{step}".encode() + self.noise_nonce
        digest = hashlib.blake2b(message, key=self.key, digest_size=_KEY_BYTES)
        return digest.digest()
