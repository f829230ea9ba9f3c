"""Answers become the report: its numbers, and what a newcomer reads at the end."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from valley_ray.assistant import Answer
from valley_ray.evaluate.accuracy import Judged, accuracy_by_kind, chance_by_kind
from valley_ray.nano.questions import HARDER_KINDS, SINGLE_KINDS
from valley_ray.quickstart.asking import Record, question_of, truth_of

Report = dict[str, Any]


def score(data_root: Path, asked: Sequence[Record], answers: Sequence[Answer]) -> Report:
    """Accuracy and chance per question kind; the harder kinds apart."""
    judged = [Judged(row["kind"], truth_of(row), answer.text) for row, answer in zip(asked, answers, strict=True)]
    truths: dict[str, list[str]] = defaultdict(list)
    for one in judged:
        truths[one.kind].append(one.truth)
    accuracy = accuracy_by_kind(judged)
    chance = chance_by_kind(truths, _known_answers(data_root))
    harder = [kind for kind in HARDER_KINDS if kind in accuracy]
    return {
        "accuracy": {kind: accuracy[kind] for kind in SINGLE_KINDS},
        "chance": {kind: chance[kind] for kind in SINGLE_KINDS},
        "harder": {kind: accuracy[kind] for kind in harder},
        "harder_chance": {kind: chance[kind] for kind in harder},
    }


def print_report(
    root: Path, model: Path, curve: Path, asked: Sequence[Record], answers: Sequence[Answer], report: Report
) -> None:
    """What a newcomer reads at the end."""
    print("\nHeld-out clips, never seen in training:")
    for number in [row for row in range(len(asked)) if asked[row]["kind"] != "shape"][:: max(1, len(asked) // 10)]:
        row = asked[number]
        truth = truth_of(row)
        mark = "right" if answers[number].text == truth else "wrong"
        print(f"  {row['video']}  {question_of(row)}")
        print(f"    answer: {answers[number].text}   truth: {truth}   ({mark})")
    print(f"\nAccuracy on {report['num_held_out']} clips (whole answers; chance in brackets):")
    for kind, value in report["accuracy"].items():
        print(f"  {kind:<10} {value:6.1%}  [{report['chance'][kind]:.1%}]")
    for kind, value in report["harder"].items():
        print(f"  {kind:<10} {value:6.1%}  [{report['harder_chance'][kind]:.1%}]  harder, few examples")
    served = report["served"]
    print(f"\n{served['num_equal']} of {served['num']} answers over HTTP equal the ones given in this process.")
    print("Seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["seconds"].items()))
    print(
        f"\nModel folder  {_short(model)}\nReport        {_short(root / 'report.json')}\nLoss curve    {_short(curve)}"
    )
    clip = _short(root / "data" / "heldout" / "single-000000.mp4")
    print("\nNext:")
    print(f'  .venv/bin/valley-ray ask --model {_short(model)} --video {clip} "What is moving?"')
    print("  .venv/bin/serve run serve_configs/valley.yaml")
    print("  .venv/bin/python jobs/finetune.py")


def _known_answers(data_root: Path) -> dict[str, list[str]]:
    """Answers of train.json by question kind; a record's id ends with the kinds of its turns."""
    known: dict[str, list[str]] = defaultdict(list)
    for row in json.loads((data_root / "train.json").read_text(encoding="utf-8")):
        kinds = row["id"].split("-", 2)[2].split("-")
        for kind, turn in zip(kinds, row["conversations"][1::2], strict=True):
            known[kind].append(turn["value"])
    return known


def _short(path: Path) -> Path:
    """Relative to the current folder where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
