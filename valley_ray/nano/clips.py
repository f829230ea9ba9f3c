"""Scenes on disk: H.264 .mp4 files, and the record lists that ask about them, in the LLaVA / Valley JSON form.

A Split says which scenes; `write_scene` makes one file, so that a cluster can make many at once; `training_records` and
`question_records` put the questions beside them. Knows no Ray and no torch.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from valley_ray.nano.questions import Question, conversations_about, questions_about
from valley_ray.nano.world import SIDE, Scene, SceneKind, render, sample_scene

FRAMES_PER_SECOND = 8


@dataclass(frozen=True)
class Split:
    """One half of the data: so many scenes of each kind from one seed."""

    name: str
    """Folder of the clips, and the name of the record file."""
    seed: int
    num_scenes: tuple[tuple[SceneKind, int], ...]
    """(kind, how many scenes)."""

    def scenes(self) -> Iterator[tuple[str, Scene]]:
        """(file stem, scene), kind after kind."""
        for kind, count in self.num_scenes:
            for index in range(count):
                yield f"{kind}-{index:06d}", sample_scene(self.seed, index, kind)

    def scene(self, stem: str) -> Scene:
        """The scene of one file stem; costs nothing of the others."""
        kind, _, index = stem.partition("-")
        kinds: dict[str, SceneKind] = {name: name for name, _ in self.num_scenes}
        return sample_scene(self.seed, int(index), kinds[kind])


def clip_name(split: Split, stem: str) -> str:
    """Path of a clip relative to the media root."""
    return f"{split.name}/{stem}.mp4"


def write_scene(path: Path, scene: Scene) -> None:
    """Encode `scene` as H.264 in an .mp4 file; the folder must exist."""
    frames_THWC = render(scene, np.linspace(0, 1, scene.num_frames))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {"preset": "veryfast", "crf": "18", "g": "12"}
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())


def training_records(split: Split, *, shuffle_answers: bool = False) -> list[dict[str, Any]]:
    """One record per conversation to learn from: `id`, `video`, `conversations` of one or more turns.

    With `shuffle_answers` every answer is replaced by that of a random other question of the same kind: data from
    which nothing can be learned but how often answers come, for the proof that what is measured was learned.
    """
    rng = np.random.default_rng([split.seed, 1])
    rows = [(stem, talk) for stem, scene in split.scenes() for talk in conversations_about(scene, rng)]
    if shuffle_answers:
        rows = list(
            zip((stem for stem, _ in rows), _with_shuffled_answers([talk for _, talk in rows], rng), strict=True)
        )
    return [_record(split, stem, talk) for stem, talk in rows]


def question_records(split: Split) -> list[dict[str, Any]]:
    """One record of one turn per question, with its `kind` beyond the LLaVA form."""
    rng = np.random.default_rng([split.seed, 2])
    return [
        _record(split, stem, [question]) | {"kind": question.kind}
        for stem, scene in split.scenes()
        for question in questions_about(scene, rng)
    ]


def _record(split: Split, stem: str, talk: Sequence[Question]) -> dict[str, Any]:
    turns = []
    for number, question in enumerate(talk):
        turns.append({"from": "human", "value": question.text if number else f"<video>\n{question.text}"})
        turns.append({"from": "gpt", "value": question.answer})
    kinds = "-".join(question.kind for question in talk)
    return {"id": f"{stem}-{kinds}", "video": clip_name(split, stem), "conversations": turns}


def _with_shuffled_answers(talks: Sequence[Sequence[Question]], rng: np.random.Generator) -> list[list[Question]]:
    answers: dict[str, list[str]] = {}
    for question in (question for talk in talks for question in talk):
        answers.setdefault(question.kind, []).append(question.answer)
    shuffled = {kind: [str(answer) for answer in rng.permutation(given)] for kind, given in answers.items()}
    return [
        [dataclasses.replace(question, answer=shuffled[question.kind].pop()) for question in talk] for talk in talks
    ]


def write_records(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a record list as JSON."""
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
