"""What a check of `valley-ray doctor` found."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    """What was looked at."""
    level: Level
    """WARN: works, but something will surprise; FAIL: something that the house needs does not work."""
    text: str
    """What was found."""
    fix: str | None = None
    """What to do; None where nothing is to be done."""
