"""jobs/answer.py: what can be typed, and mistakes in one line before Ray starts."""

from pathlib import Path
from types import ModuleType

import pytest
from asked import make_records
from job_files import JOBS, load_job

from valley_ray.errors import ConfigError
from valley_ray.evaluate import generated
from valley_ray.evaluate.answer_words import read_words
from valley_ray.evaluate.config import AnswerSettings

DEFAULT = JOBS / "configs" / "answer.yaml"


@pytest.fixture(scope="module")
def job() -> ModuleType:
    return load_job("answer")


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with records and clips, which jobs work in."""
    make_records(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALLEY_STORAGE", str(tmp_path))
    return tmp_path


def read(*words: str, **named: object) -> AnswerSettings:
    return read_words(words, **named, default=DEFAULT, say=print)  # type: ignore[arg-type]


def test_inputs_are_typed_in_either_way(storage: Path) -> None:
    typed = read("model=m", "input=records.json", "input=.", "question=What?", "output=out", "max_tokens=7")
    given = read(
        "model=m", "question=What?", "max_tokens=7", inputs=["records.json", "."], output="out", media_root=None
    )
    assert typed == given
    assert [source.path for source in typed.sources] == [str(storage / "records.json"), str(storage)]
    assert (typed.output, typed.question, typed.max_tokens) == (storage / "out", "What?", 7)


def test_a_question_is_asked_as_it_is_typed(storage: Path) -> None:
    for question in ("Is #1 a circle: yes or no?", "no", "{what}?", "Who's there?"):
        assert read("model=m", "input=.", "output=out", f"question={question}").question == question


def test_an_input_stands_for_the_sources_of_a_file(storage: Path) -> None:
    (storage / "my.yaml").write_text("model: m\noutput: out\nmax_tokens: 3\nsources: [{path: other.json}]\n")
    settings = read("my.yaml", "input=records.json")
    assert [source.path for source in settings.sources] == [str(storage / "records.json")]
    assert settings.max_tokens == 3
    with pytest.raises(ConfigError, match="input= and sources= both"):
        read("input=records.json", "sources=[{path: other.json}]")


def test_clips_are_generated_only_where_nothing_is_named(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[AnswerSettings] = []

    def note(settings: AnswerSettings, root: Path, **_: object) -> AnswerSettings:
        made.append(settings)
        return settings

    monkeypatch.setattr(generated, "make_generated", note)
    for words in (["input=records.json"], ["sources=[{path: records.json}]"]):
        read("model=m", "output=out", *words)
    assert made == []
    assert read("max_tokens=5", "model=mine") == made[0]
    assert made[0].output == storage / "runs/answer"
    assert made[0].question


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--input", "none.json", "output=out"], "no such file"),
        (["input=records.json", "output=out", "model=nowhere"], "is no model folder"),
        (["input=records.json"], "answering needs model and output"),
        (["input=.", "output=out"], "nobody asks about the clips of the sources; set question"),
        (["input=records.json", "--output", "prepared"], "is a prepared data set; choose another folder"),
        (["input=records.json", "metrics=[bleu]"], "the command line: unknown key 'metrics'"),
        (["input=records.json", "top_p=0.5"], "set temperature or drop top_p"),
        (["a.yaml", "b.yaml"], "got a.yaml and b.yaml; drop one"),
        (["none.yaml"], "cannot read configuration none.yaml"),
    ],
)
def test_mistakes_are_one_line_and_status_two(
    job: ModuleType,
    words: list[str],
    said: str,
    tiny_valley: Path,
    storage: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(job, "connect", lambda: pytest.fail("Ray was started"))
    (storage / "prepared").mkdir()
    (storage / "prepared" / "summary.json").write_text("{}")
    has_model = any(word.startswith("model=") or word.endswith(".yaml") for word in words)
    assert job.main([*words, *([] if has_model else [f"model={tiny_valley}"])]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("answer: error: ")
    assert said in captured.err
