"""Feature skew: what makes one client's images look unlike another's."""

from __future__ import annotations

from dataclasses import dataclass

from fedddp.rng import stream


@dataclass(frozen=True)
class Look:
    """What one client's camera does to its images."""

    angle: float
    """Rotation in degrees, counter-clockwise."""

    gains: tuple[float, float, float]
    """Factor of each colour channel; gray images take the first."""

    noise: float
    """Standard deviation of the pixel noise, in units of the full range."""


@dataclass(frozen=True, kw_only=True)
class FeatureSkew:
    """Feature skew: each client's images are rotated, tinted and noisy in a way of their own."""

    rotation: float = 0.0
    """Largest angle in degrees, 0 to 180; a client's angle is uniform in [-rotation, rotation]."""

    color: float = 0.0
    """Largest change of a channel's gain, 0 to 1; a client's gains are uniform in 1 ± color."""

    noise: float = 0.0
    """Largest standard deviation of the pixels (1 is white); a client's is in [0, noise]."""

    def __post_init__(self) -> None:
        for name, most in (("rotation", 180), ("color", 1), ("noise", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be between 0 and {most}, got {getattr(self, name)}")

    def look(self, client: int, seed: int) -> Look:
        """Return how `client` sees, a pure function of the fields and the arguments."""
        random = stream("look", seed, client)
        angle = self.rotation * random.uniform(-1, 1)
        red, green, blue = (1 + self.color * random.uniform(-1, 1, 3)).tolist()
        return Look(angle, (red, green, blue), self.noise * random.uniform())
