"""When checkpoints are made, so that no death costs more than a set number of steps although uploads take time.

Plain arithmetic, the same on every rank: steps in, decisions out. Knows no files, no clock and no Ray.
"""

import math


class Cadence:
    """A checkpoint is begun `lead` steps before the last moment, where its upload takes `lead` steps of training.

    An upload that takes more than half the interval would be begun twice as often: the training waits for it instead.
    """

    def __init__(self, every: int | None, *, step: int) -> None:
        """`every`: most steps that a death may cost, None for no checkpoints; `step`: where the run goes on."""
        self._every = every
        self._saved = step
        self._committed = step
        self.lead = 0
        """Steps that an upload takes, 0 where the training waits for it."""

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be made after so many steps."""
        return self._every is not None and step - self._saved >= self._every - self.lead

    def is_saved(self, step: int) -> bool:
        """Whether there is no checkpoint to be made of what has been done since the last one."""
        return self._every is None or step == self._saved

    def saved(self, step: int) -> None:
        """A checkpoint was begun after so many steps; all before are committed."""
        self._committed = self._saved
        self._saved = step

    def committed(self) -> None:
        """The last checkpoint counts."""
        self._committed = self._saved

    def must_wait(self, step: int) -> bool:
        """Whether another step after `step` would make too many that a death costs."""
        return self._every is not None and step + 1 - self._committed > self._every

    def lead_of(self, *, upload_s: float, step_s: float) -> int:
        """The `lead` that such times make."""
        steps = math.ceil(upload_s / max(step_s, 1e-9))
        return steps if self._every is not None and steps <= self._every // 2 else 0
