"""The page of predictions in a real browser: on a phone and on a desk, with answers that wish it ill."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_checks import CONTRASTS, WIDER, opened_browser
from report_tables import clip, write_shard

from valley_ray.evaluate.metrics import row_metrics, summarize, summarize_by
from valley_ray.evaluate.page import write_page
from valley_ray.evaluate.predictions import PREDICTIONS_SCHEMA

pytestmark = pytest.mark.browser

TEXTS = [
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">",
    "W" * 3000,
    "a_name_without_a_space_" * 40,
    "مرحبا بالعالم، هذا نص طويل يكتب من اليمين إلى اليسار \u202e backwards",
    "👩‍👩‍👧‍👦" * 200,
    "多" * 2000,
    "",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    shard = write_shard(folder, [clip(number) for number in range(len(TEXTS))])
    rows = []
    for number, text in enumerate(TEXTS):
        for status, lies in (("ok", shard), ("ok", "shard-gone.arrow"), ("failed", shard)):
            row = dict.fromkeys(PREDICTIONS_SCHEMA.names) | {"sample_id": text or "empty", "source": text, "kind": text}
            row |= {"question": text, "reference": text if number % 2 else "red", "status": status, "judge_error": text}
            row |= {"prediction": text if status == "ok" else None, "error": text, "error_class": text}
            rows.append(row | {"turn": 0, "clips": [{"shard": lies, "row": number}]} | row_metrics(row, METRICS))
    summary = {"rows_in": len(rows), "ok": 14, "failed": 7, "without_reference": 1, "without_verdict": 3}
    summary |= {"metrics": summarize(rows), **{f"by_{by}": summarize_by(rows, by) for by in ("source", "kind")}}
    write_page(rows, summary, folder, folder / "page.html", title=TEXTS[0], seed=0)
    return folder / "page.html"


METRICS = ("exact_match", "qa_accuracy", "bleu", "rouge")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_the_page_fits_is_readable_and_runs_nothing(browser: Any, page_path: Path, width: int, scheme: str) -> None:
    said: list[str] = []
    with browser.new_context(viewport={"width": width, "height": 780}, color_scheme=scheme) as context:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        page.goto(page_path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(WIDER) == []
        assert page.evaluate(CONTRASTS) == []
        assert "owned" not in page.title().replace("= 'owned'", "")
        assert page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        answers = page.query_selector(".answers")
        assert answers.evaluate("one => one.scrollWidth <= one.clientWidth + 1 || innerWidth > 704"), (
            "phones scroll down"
        )
        headings = [one.inner_text() for one in page.query_selector_all("h2")]
        assert headings == ["In short", "In parts", "Answers", "What failed"]
    assert said == []
