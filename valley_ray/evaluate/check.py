"""What can be known to go wrong with answers before anything starts: no model, no source. Knows no Ray."""

from pathlib import Path

from valley_ray.data.sources import open_source
from valley_ray.data.summary import SUMMARY_FILE as PREPARED_FILE
from valley_ray.errors import CheckpointError, ConfigError, DataError
from valley_ray.evaluate.config import AnswerSettings

NOBODY_ASKS = "nobody asks about the clips of the sources; set question, or name a file of records"


def check_answers(settings: AnswerSettings, *, what: str = "answering") -> None:
    """Raise, before Ray starts, for what cannot be worked with; `what` names the work.

    Raises:
        ConfigError: model or output are missing, or output is a prepared data set.
        CheckpointError: a model folder that is none.
        DataError: as `check_sources`.
    """
    if settings.model is None or settings.output is None:
        raise ConfigError(f"{what} needs model and output; set model=FOLDER output=FOLDER")
    if (settings.output / PREPARED_FILE).is_file():
        raise ConfigError(
            f"output={str(settings.output)!r} is a prepared data set; choose another folder, and "
            f"shards_dir={settings.output / 'shards'} for its decoded clips"
        )
    check_model(settings.model)
    check_sources(settings)


def check_model(folder: Path) -> None:
    """Raise CheckpointError where `folder` holds no model."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"model={str(folder)!r} is no model folder (no config.json in it); make or copy one there"
        )


def check_sources(settings: AnswerSettings) -> None:
    """Raise DataError for a source that is not there or of no known format, and for clips that nobody asks about."""
    formats = {open_source(source)[0] for source in settings.under(Path.cwd()).sources}
    if formats == {"folder"} and settings.question is None:
        raise DataError(NOBODY_ASKS)
