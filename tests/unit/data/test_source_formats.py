"""Each published format becomes clips and samples; what breaks its schema is a row with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from valley_ray.data.schema import FAILED, PENDING
from valley_ray.data.sources import SourceConfig, detect, open_source
from valley_ray.errors import DataError


def write(path: Path, records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"12345")


def read(path: Path, **values: Any) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """(format, samples, the clip of each row or an empty dict)."""
    format_name, rows = open_source(SourceConfig(path=path, **values))
    taken = list(rows)
    return (
        format_name,
        [row.sample for row in taken if row.sample],
        [row.clips[0] if row.clips else {} for row in taken],
    )


def texts(sample: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in sample["conversation"]]


def window(clip: dict[str, Any], root: Path) -> tuple[str, float | None, float | None]:
    return str(Path(clip["uri"]).relative_to(root)), clip["start_s"], clip["end_s"]


def turns() -> list[dict[str, str]]:
    return [{"from": "human", "value": "<video>\nWhat moves?"}, {"from": "gpt", "value": "A square."}]


def test_videochat_pairs_become_a_conversation(tmp_path: Path) -> None:
    touch(tmp_path, "100_150/1.mp4", "webvid/2.mp4")
    records = [
        {"video": "100_150/1.mp4", "QA": [{"i": "Describe it.", "q": "", "a": "A cat."}]},
        {"video": "100_150/2.mp4", "QA": [{"q": "Who?", "a": " He. "}, {"i": "Be brief.", "q": "Why?", "a": "So."}]},
        {"video": "3.mp4", "QA": [{"i": "Talk.", "q": "A?", "a": "B"}, {"i": "Talk.", "q": "C?", "a": "D"}]},
    ]
    format_name, samples, clips = read(write(tmp_path / "chat.json", records))
    assert format_name == "videochat"
    assert [texts(sample) for sample in samples] == [
        ["<video>\nDescribe it.", "A cat."],
        ["<video>\nWho?", "He.", "Be brief.\nWhy?", "So."],
        ["<video>\nTalk.\nA?", "B", "C?", "D"],
    ]
    assert [Path(clip["uri"]).relative_to(tmp_path).as_posix() for clip in clips] == [
        "100_150/1.mp4",
        "webvid/2.mp4",
        "3.mp4",
    ]
    assert [sample["sample_id"] for sample in samples] == ["chat.json#0", "chat.json#1", "chat.json#2"]
    assert "no such file" in clips[2]["error"]


def test_videochat_conversations_need_no_id_and_no_mark(tmp_path: Path) -> None:
    marked, bare = turns(), [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "He."}]
    records = [{"video": "1.mp4", "conversations": one} for one in (marked, bare, "text", [], ["x"], [3, *bare])]
    format_name, samples, _ = read(write(tmp_path / "chat.json", records))
    assert format_name == "videochat"
    assert [texts(sample) for sample in samples[:2]] == [
        ["<video>\nWhat moves?", "A square."],
        ["<video>\nWho?", "He."],
    ]
    assert [sample["status"] for sample in samples] == [PENDING] * 2 + [FAILED] * 4
    assert all(sample["error"] for sample in samples[2:])


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([], "must be a list of questions"),
        ("text", "must be a list of questions"),
        ([3], "pair 1 of 'QA' must have texts"),
        ([{"q": "A?", "a": 3}], "pair 1 of 'QA' must have texts"),
        ([{"q": "A?", "a": "B"}, {"q": "", "a": "B"}], "pair 2 of 'QA' needs a question"),
        ([{"q": "A?", "a": " "}], "pair 1 of 'QA' needs a question and an answer"),
    ],
)
def test_videochat_record_without_pairs_fails_with_a_reason(tmp_path: Path, pairs: Any, reason: str) -> None:
    _, [sample], _ = read(write(tmp_path / "chat.json", [{"video": "1.mp4", "QA": pairs}]))
    assert (sample["status"], sample["clip_ids"]) == (FAILED, [])
    assert reason in sample["error"]


VATEX_ID = "a_B-d_5_789_000010_000020"


def test_windows_of_valley_instruct_crop_whole_videos_and_not_cut_ones(tmp_path: Path) -> None:
    cut, whole, gone = (VATEX_ID.replace("a_B", three) for three in ("cut", "who", "gon"))
    names = [f"VATEX/{cut}.mp4", f"VATEX/v_{cut[:11]}.mp4", f"VATEX/v_{whole[:11]}.mp4", "jukinmedia/v_77.mp4"]
    touch(tmp_path, *names)
    records = [
        {"id": "cut", "v_id": cut, "video": f"v_{cut[:11]}.mp4", "source": "VATEX"},
        {"id": "whole", "v_id": whole, "video": f"v_{whole[:11]}.mp4", "source": "VATEX"},
        {"id": "no name", "videoID": whole, "source": "VATEX"},
        {"id": "windowed name", "v_id": whole, "video": f"{whole}.mp4", "source": "VATEX"},
        {"id": "plain id", "v_id": whole[:11], "videoID": whole, "source": "VATEX"},
        {"id": "id in the name", "video": f"v_{whole}.mp4", "source": "VATEX"},
        {"id": "gone", "v_id": gone, "video": f"v_{gone[:11]}.mp4", "source": "VATEX"},
        {"id": "jukin", "v_id": "77", "video": "v_77.mp4", "source": "jukinmedia"},
        {"id": "jukin without name", "v_id": 77, "source": "jukinmedia"},
    ]
    path = write(tmp_path / "instruct.json", [record | {"conversations": turns()} for record in records])
    format_name, samples, clips = read(path)
    assert format_name == "valley-instruct"
    assert {sample["status"] for sample in samples} == {PENDING}
    assert [window(clip, tmp_path) for clip in clips] == [
        (names[0], None, None),
        *[(names[2], 10, 20)] * 5,
        (f"VATEX/v_{gone[:11]}.mp4", 10, 20),
        (names[3], None, None),
        (names[3], None, None),
    ]
    assert clips[1]["clip_id"] == clips[2]["clip_id"]
    assert clips[1]["size_bytes"] == 5
    assert f"{gone}.mp4" in clips[6]["error"], "it says that the cut clip was looked for too"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"v_id": "cut45678901_000020_000010"}, "ends at 10 s, before its start at 20 s"),
        ({"v_id": None}, "'v_id' must be an id"),
        ({"v_id": ["x"]}, "'v_id' must be an id"),
        ({"v_id": "x\ud800"}, "not valid Unicode"),
        ({"v_id": "7", "source": "ssh://host"}, "'source' must be the name of a folder"),
    ],
)
def test_window_that_cannot_be_is_a_failed_row(tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "instruct.json", [{"id": "a", "conversations": turns(), **values}])
    _, [sample], _ = read(path, format="valley-instruct")
    assert sample["status"] == FAILED
    assert reason in sample["error"]


def test_every_caption_of_vatex_is_a_sample_on_one_clip(tmp_path: Path) -> None:
    touch(tmp_path, f"videos/v_{VATEX_ID[:11]}.mp4")
    other = VATEX_ID.replace("a_B", "oth")
    records = [
        {"videoID": VATEX_ID, "enCap": ["One.", "Two."], "chCap": ["一。"]},
        {"videoID": other},
        {"videoID": "short_000001_000002", "enCap": ["No."]},
        {"videoID": 5},
        {"videoID": other, "enCap": "No list."},
        {"videoID": other, "enCap": ["Good.", 3]},
    ]
    format_name, samples, clips = read(write(tmp_path / "vatex.json", records), media_root=tmp_path / "videos")
    assert format_name == "vatex"
    assert [sample["sample_id"] for sample in samples[:3]] == [f"{VATEX_ID}#{end}" for end in ("en1", "en2", "ch1")]
    assert texts(samples[2]) == ["<video>\n用一句话描述这段视频。", "一。"]
    assert len({tuple(sample["clip_ids"]) for sample in samples[:3]}) == 1
    assert window(clips[0], tmp_path) == (f"videos/v_{VATEX_ID[:11]}.mp4", 10, 20)
    assert clips[3]["uri"].endswith(f"{other[:11]}.mp4"), "the test split has no captions, but is decoded"
    assert [sample["status"] for sample in samples[3:]] == [FAILED, FAILED, FAILED, PENDING, FAILED]
    reasons = ("<11 characters>_<6 digits>", "text videoID", "list of captions", "", "'answer' must be a text")
    assert all(reason in sample["error"] for reason, sample in zip(reasons, samples[3:], strict=True))


def test_msrvtt_and_msvd_name_their_videos_by_number(tmp_path: Path) -> None:
    touch(tmp_path, "msrvtt/TrainValVideo/video7.mp4", "msvd/YouTubeClips/abc_10_20.avi", "msvd/vid9.webm")
    record = {"answer": "cat", "question": "what is it?", "id": 3}
    path = write(
        tmp_path / "msrvtt/train_qa.json", [record | {"video_id": 7, "category_id": 1}, record | {"video": "x.mp4"}]
    )
    format_name, samples, clips = read(path)
    assert (format_name, samples[0]["sample_id"], texts(samples[0])) == (
        "msrvtt-qa",
        "3",
        ["<video>\nwhat is it?", "cat"],
    )
    assert [Path(clip["uri"]).relative_to(tmp_path / "msrvtt").as_posix() for clip in clips] == [
        "TrainValVideo/video7.mp4",
        "x.mp4",
    ]
    assert "video8" not in clips[1]["error"]
    assert "x.mp4: there is no such file" in clips[1]["error"]
    (tmp_path / "msvd/youtube_mapping.txt").write_text("abc_10_20 vid1\n\n")
    path = write(tmp_path / "msvd/test_qa.json", [record | {"video_id": number} for number in (1, 9, "vid9")])
    format_name, samples, clips = read(path)
    assert format_name == "msvd-qa"
    assert [Path(clip["uri"]).name for clip in clips] == ["abc_10_20.avi", "vid9.webm", "vid9.webm"]
    (tmp_path / "map").write_text("three words here\n")
    with pytest.raises(DataError, match=r"line 1 of .*must read"):
        read(path, companion=tmp_path / "map")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"question": ""}, "'question' must be a text with words"),
        ({"answer": None}, "'answer' must be a text with words"),
        ({"video_id": None}, "'video_id' must be an id"),
        ({"video_id": 1.5}, "'video_id' must be an id"),
        ({"id": []}, "needs an 'id'"),
    ],
)
def test_question_that_lacks_something_fails_with_a_reason(tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    record = {"answer": "cat", "question": "what?", "id": 3, "video_id": 1, **values}
    _, [sample, other], _ = read(write(tmp_path / "qa.json", [record, "text"]), format="msrvtt-qa")
    assert (sample["status"], other["status"]) == (FAILED, FAILED)
    assert reason in sample["error"]


def test_questions_and_answers_of_activitynet_meet_by_id(tmp_path: Path) -> None:
    touch(tmp_path, "v_abc.mp4", "videos/def.webm")
    questions = [
        {"video_name": "abc", "question": "what", "question_id": "abc_1"},
        {"video_name": "def", "question": "who", "question_id": "def_1"},
        {"video_name": "def", "question": "why", "question_id": "def_2"},
        {"video_name": "def", "question": "none", "question_id": "def_3"},
        {"video_name": "def", "question": "no id"},
    ]
    answers = [
        {"question_id": name, "answer": text, "type": 0}
        for name, text in (("def_2", "so"), ("abc_1", "cat"), ("lost_1", "?"), ("def_1", "he"))
    ]
    answers += [answers[2], {"answer": "to what?"}]
    path = write(tmp_path / "test_q.json", questions)
    with pytest.raises(DataError, match=r"cannot read records .*test_a\.json"):
        read(path)
    write(tmp_path / "test_a.json", answers)
    format_name, samples, clips = read(path)
    assert format_name == "activitynet-qa"
    assert [(sample["sample_id"], sample["status"]) for sample in samples] == [
        ("abc_1", PENDING),
        ("def_1", PENDING),
        ("def_2", PENDING),
        ("def_3", FAILED),
        ("test_q.json#4", FAILED),
        ("test_a.json#4", FAILED),
        ("test_a.json#5", FAILED),
        ("lost_1", FAILED),
    ]
    assert [texts(sample)[1] for sample in samples[:3]] == ["cat", "he", "so"]
    assert [Path(clip["uri"]).relative_to(tmp_path).as_posix() for clip in clips[:2]] == [
        "v_abc.mp4",
        "videos/def.webm",
    ]
    assert "no answer with question_id 'def_3'" in samples[3]["error"]
    assert "a second answer with question_id 'lost_1'" in samples[5]["error"]
    assert "answer without a question" in samples[7]["error"]
    other = write(tmp_path / "questions.json", questions[:1])
    with pytest.raises(DataError, match="companion="):
        read(other)
    assert read(other, companion=tmp_path / "test_a.json")[1][0]["status"] == PENDING


def test_files_of_several_families_put_together_are_read_record_by_record(tmp_path: Path) -> None:
    records = [
        {"id": "a", "video": "1.mp4", "conversations": turns()},
        {"video": "2.mp4", "QA": [{"q": "A?", "a": "B"}]},
        {"id": "c", "v_id": VATEX_ID, "source": "VATEX", "conversations": turns()},
        {"id": "d", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        "text",
    ]
    format_name, samples, clips = read(write(tmp_path / "all.json", records))
    assert format_name == "llava"
    assert [sample["status"] for sample in samples] == [PENDING] * 4 + [FAILED]
    assert [clip.get("start_s") for clip in clips] == [None, None, 10, None, None]


@pytest.mark.parametrize(
    ("name", "content", "want"),
    [
        ("a.json", [], "llava"),
        ("a.json", ["text", {"nothing": 1}, {"id": 1, "image": "x.jpg", "conversations": []}], "llava"),
        ("a.json", [{"video": "x", "QA": []}], "videochat"),
        ("a.json", [{"videoID": VATEX_ID}], "vatex"),
        ("a.json", [{"videoID": VATEX_ID, "conversations": []}], "valley-instruct"),
        ("a.json", [{"question": "q", "answer": "a", "video_id": 1, "category_id": 2}], "msrvtt-qa"),
        ("MSVD-QA/a.json", [{"question": "q", "answer": "a", "video_id": 1}], "msvd-qa"),
        ("msr_vtt/a.json", [{"question": "q", "answer": "a", "video_id": 1}], "msrvtt-qa"),
        ("a_q.json", [{"question": "q", "video_name": "a", "question_id": 1}], "activitynet-qa"),
        ("no_ending", [{"video": "x", "QA": []}], "videochat"),
    ],
)
def test_format_is_told_by_the_first_records(tmp_path: Path, name: str, content: Any, want: str) -> None:
    # The folder pytest makes carries this test's name, never that of a data set.
    assert detect(str(write(tmp_path / name, content))) == want


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", [{"foo": 1, "bar": 2}], "from the keys foo, bar; give format=, one of llava, videochat,"),
        ("a.json", [1, 2], "from records of int"),
        ("a.json", [{"question": "q", "answer": "a", "video_id": 1}], "fit msvd-qa and msrvtt-qa"),
        ("a.txt", "hello", r"the ending \.txt and no JSON list"),
    ],
)
def test_unknown_format_says_what_was_seen_and_what_there_is(
    tmp_path: Path, name: str, content: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        detect(str(write(tmp_path / name, content)))
    with pytest.raises(DataError, match="there is no such file or folder"):
        detect(str(tmp_path / "nowhere.json"))
