"""Outcomes in memory: what goes in comes out, and takes little room."""

import tracemalloc
from typing import Any

from valley_ray.data.outcomes import Outcomes
from valley_ray.data.stages import OUTCOME_SCHEMA


def outcome(number: int, **values: Any) -> dict[str, Any]:
    row = dict.fromkeys(OUTCOME_SCHEMA.names) | {"clip_id": f"{number:032x}", "status": "ok", "error_class": ""}
    row |= {"error": "", "attempts": 1, "num_frames": 8, "content_digest": "", "row": number % 32, "width": 1280}
    row |= {"shard": f"shard-{number // 32 // 8:05d}-{number // 32 % 8:04d}-0123456789ab.arrow", "height": 720}
    return row | {"duration_s": 10 + number / 1000, "fps": 25.0} | values


def test_outcomes_come_out_as_they_went_in() -> None:
    rows = [outcome(1), outcome(2, status="failed", error_class="media_empty", fps=None, width=25, height=25)]
    outcomes = Outcomes((row["clip_id"], row) for row in rows)
    assert list(outcomes.values()) == rows
    assert type(outcomes[rows[0]["clip_id"]]["fps"]) is float, "25.0 is not the 25 of another column"
    assert {"x", rows[0]["clip_id"]} - outcomes.keys() == {"x"}
    outcomes[rows[0]["clip_id"]] = rows[0] | {"status": "failed"}
    assert (len(outcomes), outcomes[rows[0]["clip_id"]]["status"]) == (2, "failed")
    del outcomes[rows[0]["clip_id"]]
    assert rows[0]["clip_id"] not in outcomes


def test_outcomes_take_less_than_half_a_kilobyte_each() -> None:
    tracemalloc.start()
    try:
        # As they arrive: every value a new object.
        outcomes = Outcomes((row["clip_id"], row) for row in (outcome(number) for number in range(20_000)))
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert size / len(outcomes) < 500
