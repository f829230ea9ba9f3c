"""Scenes in words: captions, and questions with their one right answer.

A question kind is asked in several phrasings and has exactly one answer per scene, so that an answer is right when it
equals the truth as a whole.
"""

from dataclasses import dataclass

import numpy as np

from valley_ray.nano.world import Actor, Scene

COLUMNS = ("far left", "left", "middle", "right", "far right")
ROWS = ("top", "upper", "center", "lower", "bottom")
NUMBERS = ("zero", "one", "two", "three", "four")

PHRASINGS: dict[str, tuple[str, ...]] = {
    "color": ("What color is the shape?", "Which color does the moving thing have?", "Name the color of the shape."),
    "shape": ("What shape is it?", "Which shape is moving?", "Name the shape in the video."),
    "direction": ("Which way does it move?", "In which direction does the shape go?", "Where is the shape moving to?"),
    "caption": ("Describe the video.", "What is happening in this video?", "What is moving?"),
    "two_shapes": ("Describe both shapes.", "Which two shapes are moving?"),
    "sequence": ("Describe the movement in order.", "How does it move first and then?"),
    "count": ("How many shapes are there?", "Count the shapes."),
}
"""Question kind to its phrasings. `color`, `shape`, `direction` and `caption` belong to scenes of kind "single"."""

SINGLE_KINDS = ("color", "shape", "direction", "caption")
HARDER_KINDS = ("two_shapes", "sequence", "count")


@dataclass(frozen=True)
class Question:
    """One question about a scene and the one answer that counts as right."""

    kind: str
    text: str
    answer: str


def questions_about(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All question kinds that fit `scene`, in random order, each in a random phrasing."""
    answers = _answers(scene)
    kinds = [str(kind) for kind in rng.permutation(list(answers))]
    return [Question(kind, str(rng.choice(PHRASINGS[kind])), answers[kind]) for kind in kinds]


def conversations_about(scene: Scene, rng: np.random.Generator) -> list[list[Question]]:
    """The questions as conversations to learn from: all that tell nothing about each other in one, a caption alone.

    A caption among earlier or later turns could be copied from them, or they from it, and nothing need be seen.
    """
    questions = questions_about(scene, rng)
    captions = [[question] for question in questions if question.kind == "caption"]
    others = [question for question in questions if question.kind != "caption"]
    return [others, *captions] if others else captions


def _answers(scene: Scene) -> dict[str, str]:
    first = scene.actors[0]
    if scene.kind == "single":
        return {
            "color": first.color,
            "shape": first.shape,
            "direction": first.directions[0],
            "caption": f"a {_name(first)} moves {first.directions[0]}",
        }
    if scene.kind == "pair":
        left, right = sorted(scene.actors, key=lambda actor: actor.path[0][0])
        return {
            "two_shapes": f"a {_name(left)} moves {left.directions[0]} and a {_name(right)} moves {right.directions[0]}"
        }
    if scene.kind == "sequence":
        return {"sequence": f"first {first.directions[0]} then {first.directions[1]}"}
    return {"count": NUMBERS[len(scene.actors)]}


def _name(actor: Actor) -> str:
    return f"{actor.color} {actor.shape}"


def place_words(x: float, y: float, side: float) -> str:
    """A place in a `side` x `side` picture in words, on a grid of five columns and five rows."""
    column = COLUMNS[min(4, max(0, int(x / side * 5)))]
    row = ROWS[min(4, max(0, int(y / side * 5)))]
    return f"{row} {column}"


def caption_views(scene: Scene, progress: float, *, offset: float, side: float) -> dict[str, str]:
    """What one frame of `scene` shows, in several degrees of detail: `full`, `shape`, `place`, `color`.

    Shapes are named from left to right; a scene of standing shapes is told by their number.
    `offset` is what a centre crop takes from the left and top, `side` the width of what is left, both in pixels.
    """
    if scene.kind == "count":
        number, color = NUMBERS[len(scene.actors)], scene.actors[0].color
        return {"full": f"{number} {color}", "shape": number, "place": number, "color": color}
    centers = {actor: actor.center(progress) for actor in scene.actors}
    actors = sorted(scene.actors, key=lambda actor: centers[actor][0])
    places = [place_words(centers[actor][0] - offset, centers[actor][1] - offset, side) for actor in actors]
    return {
        "full": " and ".join(f"{_name(actor)} {place}" for actor, place in zip(actors, places, strict=True)),
        "shape": " and ".join(actor.shape for actor in actors),
        "place": " and ".join(places),
        "color": " and ".join(actor.color for actor in actors),
    }
