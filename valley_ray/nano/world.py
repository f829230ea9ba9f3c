"""The nano world: a seed and an index become a Scene of coloured shapes that move; a Scene becomes frames.

Knows nothing of files, codecs or language: `questions.py` puts a scene into words, `clips.py` into an .mp4 file.
Places and sizes are in pixels of a SIDE x SIDE frame, y growing downwards. T frames, H = W = SIDE.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

SIDE = 64
"""Width and height of a generated frame."""
VISIBLE = SIDE * 224 / 256
"""The middle part of a frame that the centre crop of the video path keeps; shapes stay inside it."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 175, 60),
    "blue": (45, 75, 230),
    "yellow": (235, 215, 45),
    "purple": (165, 55, 200),
    "cyan": (60, 205, 220),
}
SHAPES = ("ring", "square", "bar", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

SceneKind = Literal["single", "pair", "sequence", "count"]
SCENE_KINDS: tuple[SceneKind, ...] = ("single", "pair", "sequence", "count")


@dataclass(frozen=True)
class Actor:
    """One shape and its way through the clip."""

    shape: str
    color: str
    rgb: tuple[int, int, int]
    radius: float
    directions: tuple[str, ...]
    """One entry per leg of equal duration; empty for a shape that stands still."""
    path: tuple[tuple[float, float], ...]
    """Centres (x, y) at the ends of the legs: one more than there are legs."""

    def center(self, progress: float) -> tuple[float, float]:
        """Place at `progress` 0..1 through the clip, linear within each leg."""
        legs = len(self.path) - 1
        if legs == 0:
            return self.path[0]
        leg = min(int(progress * legs), legs - 1)
        part = progress * legs - leg
        (x0, y0), (x1, y1) = self.path[leg], self.path[leg + 1]
        return x0 + (x1 - x0) * part, y0 + (y1 - y0) * part


@dataclass(frozen=True)
class Scene:
    """Everything that is in one clip; equal scenes render to equal frames."""

    kind: SceneKind
    actors: tuple[Actor, ...]
    background: tuple[int, int, int]
    gradient: float
    """Brightness added from the left to the right edge."""
    noise: float
    """Standard deviation of the pixel noise, in levels of 0..255."""
    noise_seed: int
    num_frames: int

    @property
    def digest(self) -> str:
        """SHA-256 over all fields: equal exactly where the clips are equal."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()


def sample_scene(seed: int, index: int, kind: SceneKind) -> Scene:
    """The scene number `index` of the world `seed`; a pure function of its arguments."""
    rng = np.random.default_rng([seed, index, SCENE_KINDS.index(kind)])
    base = rng.uniform(15, 190)
    return Scene(
        kind=kind,
        actors=_actors(rng, kind),
        background=tuple(int(np.clip(base + rng.uniform(-12, 12), 0, 255)) for _ in range(3)),  # type: ignore[arg-type]
        gradient=float(rng.uniform(-25, 25)),
        noise=float(rng.uniform(0, 6)),
        noise_seed=int(rng.integers(2**31)),
        num_frames=int(rng.integers(12, 25)),
    )


def render(scene: Scene, progress: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Frames uint8 [T, SIDE, SIDE, 3] (RGB) of `scene` at the times `progress` [T], each 0..1 through the clip."""
    rng = np.random.default_rng(scene.noise_seed)
    ramp = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)[None, :, None] * scene.gradient
    canvas = np.asarray(scene.background, dtype=np.float32) + np.broadcast_to(ramp, (SIDE, SIDE, 3))
    grain = rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * scene.noise + 0.5
    frames = np.empty((len(progress), SIDE, SIDE, 3), dtype=np.uint8)
    for row, moment in enumerate(progress):
        image = canvas.copy()
        for actor in scene.actors:
            _paint(image, actor, actor.center(float(moment)))
        # One field of grain shifted from frame to frame looks as lively as a new one and costs a tenth.
        shift = (int(rng.integers(SIDE)), int(rng.integers(SIDE)))
        image += np.roll(grain, shift, axis=(0, 1))
        frames[row] = np.clip(image, 0, 255, out=image).astype(np.uint8)
    return frames


def _actors(rng: np.random.Generator, kind: SceneKind) -> tuple[Actor, ...]:
    if kind == "single":
        return (_moving_actor(rng, _free_colors(rng, 1)[0], legs=1, lane=None),)
    if kind == "sequence":
        return (_moving_actor(rng, _free_colors(rng, 1)[0], legs=2, lane=None),)
    if kind == "pair":
        first, second = _free_colors(rng, 2)
        lanes = ("left", "right") if rng.random() < 0.5 else ("right", "left")
        return (_moving_actor(rng, first, legs=1, lane=lanes[0]), _moving_actor(rng, second, legs=1, lane=lanes[1]))
    return _standing_actors(rng, int(rng.integers(1, 5)))


def _free_colors(rng: np.random.Generator, count: int) -> list[str]:
    return [str(name) for name in rng.permutation(list(COLORS))[:count]]


def _dress(rng: np.random.Generator, color: str) -> tuple[str, tuple[int, int, int]]:
    rgb = tuple(int(np.clip(level + rng.integers(-18, 19), 0, 255)) for level in COLORS[color])
    return str(rng.choice(SHAPES)), (rgb[0], rgb[1], rgb[2])


def _moving_actor(rng: np.random.Generator, color: str, *, legs: int, lane: str | None) -> Actor:
    """A shape whose whole way lies inside the visible part; `lane` keeps it to the left or right half."""
    shape, rgb = _dress(rng, color)
    radius = float(rng.uniform(9, 13) if lane is None else rng.uniform(7, 9))
    low, high = (SIDE - VISIBLE) / 2 + radius * 0.8, (SIDE + VISIBLE) / 2 - radius * 0.8
    x_low = low if lane != "right" else SIDE / 2 + radius * 0.9
    x_high = high if lane != "left" else SIDE / 2 - radius * 0.9
    names: list[str] = []
    axes = rng.permutation(2)
    for leg in range(legs):
        options = ("left", "right") if (axes[leg % 2] == 0 and lane is None) else ("up", "down")
        names.append(str(rng.choice(options)))
    # Long ways: a direction can then be read off the places alone, which a small model learns in a hundred steps.
    steps = [np.asarray(DIRECTIONS[name]) * rng.uniform(0.6, 0.9) * (high - low) for name in names]
    offsets = np.vstack([np.zeros(2), np.cumsum(steps, axis=0)])
    start_low = np.array([x_low, low]) - offsets.min(axis=0)
    start_high = np.array([x_high, high]) - offsets.max(axis=0)
    start = rng.uniform(np.minimum(start_low, start_high), np.maximum(start_low, start_high))
    path = tuple((float(x), float(y)) for x, y in start + offsets)
    return Actor(shape, color, rgb, radius, tuple(names), path)


def _standing_actors(rng: np.random.Generator, count: int) -> tuple[Actor, ...]:
    """`count` shapes of one colour, one per quarter of the frame so that none hides another."""
    color = _free_colors(rng, 1)[0]
    quarters = rng.permutation(4)[:count]
    actors = []
    for quarter in quarters:
        shape, rgb = _dress(rng, color)
        radius = float(rng.uniform(5.5, 8))
        x = SIDE / 2 + (quarter % 2 - 0.5) * VISIBLE / 2 + rng.uniform(-3, 3)
        y = SIDE / 2 + (quarter // 2 - 0.5) * VISIBLE / 2 + rng.uniform(-3, 3)
        actors.append(Actor(shape, color, rgb, radius, (), ((float(x), float(y)),)))
    return tuple(actors)


def _paint(image: npt.NDArray[np.float32], actor: Actor, center: tuple[float, float]) -> None:
    """Blend `actor` into `image` [SIDE, SIDE, 3], touching only the pixels around it."""
    reach = actor.radius * 1.2 + 1
    x0, x1 = max(0, int(center[0] - reach)), min(SIDE, int(center[0] + reach) + 1)
    y0, y1 = max(0, int(center[1] - reach)), min(SIDE, int(center[1] + reach) + 1)
    x = np.arange(x0, x1, dtype=np.float32)[None, :] + np.float32(0.5 - center[0])
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - center[1])
    cover = _cover(actor.shape, x, y, actor.radius)[:, :, None]
    patch = image[y0:y1, x0:x1]
    patch += (np.asarray(actor.rgb, dtype=np.float32) - patch) * cover


def _cover(
    shape: str, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], radius: float
) -> npt.NDArray[np.float32]:
    """Share of each pixel that the shape covers, 0..1, softened by a pixel; x [1, W] and y [H, 1] from its centre."""
    if shape == "ring":
        distance = np.abs(np.hypot(x, y) - radius * 0.72) - radius * 0.26
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius * 0.88
    elif shape == "bar":
        distance = np.maximum(np.abs(x) - radius * 1.1, np.abs(y) - radius * 0.36)
    elif shape == "cross":
        arm, length = radius * 0.34, radius
        upright = np.maximum(np.abs(x) - arm, np.abs(y) - length)
        level = np.maximum(np.abs(x) - length, np.abs(y) - arm)
        distance = np.minimum(upright, level)
    else:
        raise AssertionError(f"unknown shape {shape!r}")
    return np.asarray(np.clip(0.5 - distance, 0, 1), dtype=np.float32)
