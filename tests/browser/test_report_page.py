"""The report in a real browser: on a phone and on a desk, in light and in dark, with texts that wish it ill."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_checks import CONTRASTS, WIDER, opened_browser
from report_tables import clip, clips_table, failed_clip, sample, samples_table, turn, write_shard

from valley_ray.data.report import write_report

pytestmark = pytest.mark.browser

TEXTS = [
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">",
    "W" * 10_000,
    "a_name_without_a_space_" * 40,
    "مرحبا بالعالم، هذا نص طويل يكتب من اليمين إلى اليسار \u202e backwards",
    "👩‍👩‍👧‍👦" * 200,
    "Z̸̡̢̛͇͓͈̫̣̗̭̠̜̞̗̖̤̤̪̲̪̖̱̭͓̪̐̾̏̐̀̌̈́͗͑̇̃͗͝͠ algo " * 30,
    "多" * 2000,
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    clips = [clip(n, row=n, uri=f"/v/{text.replace('/', '_')}.mp4", content_digest="d") for n, text in enumerate(TEXTS)]
    shard = write_shard(folder, clips)
    clips = [row | {"shard": shard} for row in clips]
    clips += [failed_clip(100 + n, f"class_{n}", text, uri=text) for n, text in enumerate(TEXTS)]
    samples = [
        sample(
            n, [f"c{n}"], sample_id=text, source=text, conversation=[turn("user", text), turn("assistant", text)] * 3
        )
        for n, text in enumerate(TEXTS)
    ]
    write_report(clips_table(clips), samples_table(samples), folder, folder / "report.html", title=TEXTS[1])
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_the_page_fits_is_readable_and_runs_nothing(
    browser: Any, hostile_report: Path, width: int, scheme: str
) -> None:
    said: list[str] = []
    with browser.new_context(viewport={"width": width, "height": 780}, color_scheme=scheme) as context:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        page.goto(hostile_report.as_uri())
        for details in page.query_selector_all("details:not([open]) > summary"):
            details.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(WIDER) == []
        assert page.evaluate(CONTRASTS) == []
        assert "owned" not in page.title()
        assert page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        assert [one.inner_text() for one in page.query_selector_all("h2")] == [
            "In short",
            "Sources",
            "What is in it",
            "Rows to look at",
            "What failed",
            "Equal contents",
            "Made with",
        ]
    assert said == []


def test_links_lead_to_the_parts(browser: Any, hostile_report: Path) -> None:
    with browser.new_context(viewport={"width": 360, "height": 780}) as context:
        page = context.new_page()
        page.goto(hostile_report.as_uri())
        page.click("nav >> text=What failed")
        assert abs(page.query_selector("#what-failed").bounding_box()["y"]) < 5
