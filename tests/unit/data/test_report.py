"""The report says what the tables say, whatever stands in them, in bounded space."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from report_tables import (
    Page,
    clip,
    clips_table,
    failed_clip,
    report,
    sample,
    samples_table,
    turn,
    write_shard,
)

from valley_ray.data.report import facts, write_report
from valley_ray.data.report.histograms import bars
from valley_ray.data.report.markup import duration, quantity, size
from valley_ray.data.schema import FAILED, PENDING

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    '"><img src=x onerror="alert(1)">',
    "</p></article></main></body></html>",
    "'; --><style>*{display:none}</style>",
    "&lt;b&gt; &amp; &#60;",
    "x" * 10_000,
    "مرحبا بالعالم ‮ backwards",
    "👩‍👩‍👧‍👦 🎬🏴󠁧󠁢󠁷󠁬󠁳󠁿",
    "nul \x00 escape \x1b[31m bell \x07",
    "",
]


def test_totals_and_sources_are_those_of_the_tables(tmp_path: Path) -> None:
    clips = [clip(n) for n in range(5)] + [failed_clip(5, "media_corrupt", "v5.mp4: bad"), clip(6)]
    bad = {"status": FAILED, "error_class": "media_corrupt", "error": "v5.mp4: bad"}
    samples = [sample(n, [f"c{min(n, 3)}"]) for n in range(5)]
    samples += [sample(5, ["c0", "c4"], source="b.json"), sample(6, ["c5"], source="b.json", **bad)]
    page = report(tmp_path, clips_table(clips), samples_table(samples))
    assert page.rows("samples by source and status") == [["a.json", "5", "5", "0"], ["b.json", "2", "1", "1"]]
    assert page.rows("clips by source and status") == [
        ["a.json", "4", "4", "0"],
        ["b.json", "3", "2", "1"],
        ["clips that no sample shows", "1", "1", "0"],
    ]
    assert "Clips: 7 in = 6 ok + 1 failed." in page.words
    assert "Samples: 7 in = 6 ok + 1 failed." in page.words
    assert "1 sample failed with a clip." in page.words
    facts = ("clips in 7", "clips failed 1", "samples in 7", "frames kept 48", "of video that decodes 1 min 0 s")
    assert all(fact in page.words for fact in (*facts, "of files 7 kB"))


def test_unfinished_work_is_said_to_be_so(tmp_path: Path) -> None:
    page = report(tmp_path, clips_table([clip(0), clip(1, status=PENDING)]), samples_table([]))
    assert "1 of 2 clips are pending: the work has not ended." in page.words


def test_every_failed_file_is_listed_under_its_class_with_its_reason(tmp_path: Path) -> None:
    clips = [failed_clip(n, "media_corrupt", f"v{n}.mp4: frame {n} does not decode") for n in range(30)]
    clips += [failed_clip(30, "decode_timeout", "v30.mp4: took too long", start_s=1.5, end_s=3.0), clip(31)]
    page = report(tmp_path, clips_table(clips), samples_table([]))
    rows = page.rows("Failed with media_corrupt")
    assert rows == [
        [f"/videos/v{n}.mp4 v{n}.mp4: frame {n} does not decode".replace(" v", "v", 1), "2"] for n in range(30)
    ]
    assert page.rows("Failed with decode_timeout") == [["/videos/v30.mp4 [1.5 s to 3 s]v30.mp4: took too long", "2"]]
    assert "media_corrupt : 30. " in page.words


def test_long_lists_end_with_the_number_of_the_others_and_hide_no_rare_class(tmp_path: Path) -> None:
    clips = [failed_clip(n, "decode_timeout", "too long " * 40) for n in range(9000)]
    clips += [failed_clip(n, "media_empty", "empty") for n in range(9000, 9003)]
    page = report(tmp_path, clips_table(clips), samples_table([]))
    assert len(page.rows("Failed with media_empty")) == 3
    shown = len(page.rows("Failed with decode_timeout"))
    assert 1000 < shown <= 5000
    assert f"and {9000 - shown:,} more in clips/*.parquet" in page.words
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


def test_the_page_stays_small_whatever_the_texts(tmp_path: Path) -> None:
    long = "'\"&" * 4000
    clips = [failed_clip(n, f"class_{n % 90}", long, uri=f"/{long}/{n}/{long}") for n in range(6000)]
    clips += [clip(n, uri=f"{long}{n}", content_digest=f"{n // 12}", row=n % 12) for n in range(6000, 8400)]
    shard = write_shard(tmp_path, clips[-12:], side=256)
    clips = [row | {"shard": shard} for row in clips]
    said = [turn(long, long)] * 30
    samples = [
        sample(n, [f"c{6000 + n}"], sample_id=f"{long}{n}", source=f"{long}{n}", conversation=said) for n in range(80)
    ]
    bad = {"status": FAILED, "error_class": long, "error": long}
    samples += [sample(n, [], sample_id=long, source=long, conversation=[], **bad) for n in range(80, 1500)]
    report(tmp_path, clips_table(clips), samples_table(samples), made_with={long: long})
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


def test_frequent_classes_share_what_the_rare_ones_leave() -> None:
    classes = ["often"] * 90 + ["rare"] + ["usual"] * 80
    table = clips_table([failed_clip(n, name, "bad") for n, name in enumerate(classes)] + [clip(999)])
    groups = facts.failures(table, facts.is_status(table, FAILED), limit=11)
    assert [(group.label, group.num_rows, group.rows.tolist()) for group in groups] == [
        ("often", 90, [0, 1, 2, 3, 4]),
        ("usual", 80, [91, 92, 93, 94, 95]),
        ("rare", 1, [90]),
    ]


def test_samples_with_a_fault_of_their_own_are_listed_too(tmp_path: Path) -> None:
    fault = {"status": FAILED, "error_class": "invalid_conversation", "error": "record 3: two turns of human"}
    samples = [sample(0, ["c0"]), sample(1, [], **fault)]
    page = report(tmp_path, clips_table([clip(0)]), samples_table(samples))
    assert page.rows("Failed with invalid_conversation") == [["s1record 3: two turns of human", "a.json"]]


def test_histograms_count_what_the_columns_hold(tmp_path: Path) -> None:
    durations = [1.0] * 10 + [3.0] * 5 + [7.0, 40.0, 900.0, None]
    rates = [23.976, 24.0, 25.0, 25.0, 29.97, None]
    clips = [clip(n, duration_s=value, fps=rates[n % 6]) for n, value in enumerate(durations)]
    clips[0] |= {"width": 1080, "height": 1920}
    clips[1] |= {"width": None, "height": None}
    samples = [sample(n, num_tokens=50 * (n + 1), conversation=[turn("user", "hm")] * (n % 3 + 1)) for n in range(30)]
    page = report(tmp_path, clips_table(clips), samples_table(samples))
    seconds = page.rows("Duration: clips by seconds")
    assert [[label, number] for label, _, number in seconds] == [
        ["1 to 2", "10"],
        ["2 to 5", "5"],
        ["5 to 10", "1"],
        ["10 to 20", "0"],
        ["20 to 50", "1"],
        ["50 to 100", "0"],
        ["100 to 200", "0"],
        ["200 to 500", "0"],
        ["500 to 1,000", "1"],
    ]
    assert "18 clips: median 1 s, from 1 s to 15 min 0 s; 1 unknown" in page.words
    rate = {row[0]: int(row[2]) for row in page.rows("Frame rate: clips by frames per second")}
    assert rate == {"23.98": 4, "24": 3, "25": 6, "29.97": 3}
    sides = {row[0]: int(row[2]) for row in page.rows("Resolution: clips by short side, pixels")}
    assert sides == {"360 to 479": 17, "480 to 719": 0, "720 to 1,079": 0, "1,080 to 1,439": 1}
    turns = {row[0]: int(row[2]) for row in page.rows("Conversation length: samples by turns")}
    assert turns == {"1": 10, "2": 10, "3": 10}
    tokens = page.rows("Conversation length in tokens: samples by tokens")
    assert sum(int(row[2]) for row in tokens) == 30
    assert page.rows("Frames kept per clip: clips by frames") == [["8", "", "19"]]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0],
        [0.0, 0.0],
        [5.0] * 1000,
        [0.0, 1.0],
        [0.0] * 99 + [1e9],
        [999.9999999999999] * 9 + [1e5],
        [1e-9, 1e-3, 1e12],
        [1.0, 1.0 + 2**-52],
        [10.0**exponent for exponent in range(-3, 9)],
        [float(number) for number in range(1000)],
        np.random.default_rng(0).lognormal(2.0, 2.0, 5000).tolist(),
    ],
)
def test_bins_hold_every_value_once_and_are_few(values: list[float], whole: bool) -> None:
    values = [float(round(value)) for value in values] if whole else values
    for single in (False, True):
        found = bars(np.array(values, np.float64), whole=whole, single=single, form=quantity)
        assert sum(one.count for one in found) == len(values)
        assert len(found) <= 25
        assert not found or (found[0].count and found[-1].count)
        if whole:
            assert len({one.label for one in found}) == len(found)


def test_numbers_are_written_as_one_reads_them() -> None:
    assert [size(number) for number in (0, 999, 1000, 999_999, 1_500_000, 999_600_000, 5 * 10**15)] == [
        "0\u00a0B",
        "999\u00a0B",
        "1\u00a0kB",
        "1\u00a0MB",
        "1.5\u00a0MB",
        "1\u00a0GB",
        "5,000\u00a0TB",
    ]
    assert [quantity(value) for value in (0, 0.001, 0.25, 23.976, 30.0, 1234.5)] == [
        "0",
        "0.001",
        "0.25",
        "23.98",
        "30",
        "1,234",
    ]
    assert [duration(value) for value in (0.5, 61, 3600 * 25)] == [
        "0.5\u00a0s",
        "1\u00a0min 1\u00a0s",
        "25\u00a0h 0\u00a0min",
    ]


def test_empty_tables_make_a_report(tmp_path: Path) -> None:
    page = report(tmp_path, clips_table([]), samples_table([]))
    assert "Clips: 0 in = 0 ok + 0 failed." in page.words
    assert "There are no rows." in page.words
    assert page.words.count("Not known of any.") == 6
    assert "No clip has frames to show." in page.words


def test_nothing_that_a_data_set_says_becomes_markup(tmp_path: Path) -> None:
    names = [text.replace("/", "_") for text in HOSTILE]
    clips = [clip(n, uri=f"/v/{name}.mp4", row=n, sampling=name) for n, name in enumerate(names)]
    clips += [failed_clip(100 + n, text or "x", text, uri=text, content_digest="d") for n, text in enumerate(HOSTILE)]
    shard = write_shard(tmp_path, clips[: len(names)])
    clips = [row | {"shard": shard} for row in clips]
    said = [turn(text, text) for text in HOSTILE]
    samples = [
        sample(n, [f"c{n}"], sample_id=text, source=text, conversation=[turn("user", text), *said])
        for n, text in enumerate(HOSTILE)
    ]
    output = tmp_path / "report.html"
    made_with = {text: text for text in HOSTILE}
    title = HOSTILE[0]
    write_report(clips_table(clips), samples_table(samples), tmp_path, output, title=title, made_with=made_with)
    html = output.read_text(encoding="utf-8")
    page = Page(html)
    known = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "a",
        "header",
        "nav",
        "ul",
        "li",
        "main",
        "section",
        "h1",
    }
    known |= {
        "h2",
        "h3",
        "dl",
        "div",
        "dt",
        "dd",
        "p",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "span",
        "bdi",
        "br",
    }
    known |= {"article", "figure", "figcaption", "img", "ol", "details", "summary", "strong", "code"}
    assert {tag for tag, _ in page.tags} <= known
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert all(image["src"].startswith("data:image/webp;base64,") for image in page.of("img"))
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", html)
    assert "<script>document.title" in page.words  # shown as text
    assert len(page.of("section")) == 7
    assert len(html) < 1_000_000


def test_long_names_keep_their_ends_and_are_whole_in_the_title(tmp_path: Path) -> None:
    uri = "/" + "deep/" * 40 + "n" * 100 + "-part-17.mp4"
    page = report(tmp_path, clips_table([failed_clip(0, "media_empty", "e", uri=uri)]), samples_table([]))
    [[cell, _]] = page.rows("Failed with media_empty")
    assert "-part-17.mp4" in cell
    assert "…" in cell
    assert len(cell) < 100
    assert uri in {attributes.get("title") for attributes in page.of("bdi")}


def test_what_it_was_made_with_is_said(tmp_path: Path) -> None:
    clips = clips_table([clip(0), clip(1, sampling="fps1"), clip(2)])
    page = report(tmp_path, clips, samples_table([]), made_with={"decoder": "pyav-18"})
    rows = dict(page.rows("What the data set was made with"))
    assert rows["decoder"] == "pyav-18"
    assert {"valley_ray", "av", "pyarrow", "Python"} <= rows.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", rows["date"])
    assert "n8 (2 clips)" in page.words
    assert "fps1 (1 clip)" in page.words


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = report(tmp_path, clips_table([clip(0)]), samples_table([sample(0, ["c0"])]))
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    assert [given for given in page.of("meta") if given.get("http-equiv") == "Content-Security-Policy"]
    assert [heading for tag, heading in page.headings if tag == "h1"] == ["a set"]
    targets = {given["href"] for given in page.of("a")}
    anchors = {f"#{given['id']}" for _, given in page.tags if "id" in given}
    assert targets <= anchors
    assert not list(tmp_path.glob(".report*"))


@pytest.mark.parametrize("chunks", [1, 3])
def test_chunked_tables_count_alike(tmp_path: Path, chunks: int) -> None:
    clips, samples = [clip(n, content_digest="ab") for n in range(9)], [sample(n, [f"c{n}"]) for n in range(9)]
    size = 9 // chunks
    parts = [slice(first, first + size) for first in range(0, 9, size)]
    page = report(
        tmp_path,
        pa.concat_tables([clips_table(clips[part]) for part in parts]),
        pa.concat_tables([samples_table(samples[part]) for part in parts]),
    )
    assert page.rows("samples by source and status") == [["a.json", "9", "9", "0"]]
    assert page.rows("clips by source and status") == [["a.json", "9", "9", "0"]]
    assert "8 clips, in 1 group." in page.words
