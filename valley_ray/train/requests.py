"""What a running training is asked for from outside, agreed on by all its workers at the end of a step."""

import enum
import time

import ray.train
import torch
import torch.distributed

from valley_ray.train.run_folder import RunFolder

EXPORT_FILE = "export"
"""A file of this name in the folder of the run asks for a model folder."""

_POLL_S = 1.0
_REMOTE_POLL_S = 15.0
_PREEMPTION_POLL_S = 5.0
"""Ray Train itself looks for nodes that drain as often."""


class Request(enum.IntFlag):
    """What is to be done after a step."""

    NONE = 0
    EXPORT = 1
    """Write a model folder."""
    LEAVE = 2
    """A node is about to be taken away: checkpoint, and end this attempt."""
    COMMITTED = 4
    """The last checkpoint counts."""
    _LOOK = 8


class Requests:
    """Rank 0 looks, at most once a second; the others follow."""

    def __init__(self, folder: RunFolder, *, rank: int, device: torch.device) -> None:
        self._folder = folder
        self._rank = rank
        self._device = device
        self._next_look_s = 0.0
        self._next_preemption_s = 0.0

    def poll(self, *, is_committed: bool, lead: int) -> tuple[Request, int]:
        """The requests since the last call, and the lead; collective, all ranks get what rank 0 has."""
        flags = (self._look() if self._rank == 0 else Request.NONE) | (Request.COMMITTED if is_committed else 0)
        agreed = torch.tensor([int(flags), lead], device=self._device)
        torch.distributed.broadcast(agreed, src=0)
        value, lead = agreed.tolist()
        found = Request(value)
        if Request._LOOK in found and ray.train.get_preemption_info() is not None:
            found |= Request.LEAVE
        return found & ~Request._LOOK, lead

    def _look(self) -> Request:
        now, found = time.monotonic(), Request.NONE
        if now >= self._next_look_s:
            self._next_look_s = now + (_POLL_S if self._folder.is_local else _REMOTE_POLL_S)
            if self._folder.has(EXPORT_FILE):
                self._folder.remove(EXPORT_FILE)
                found |= Request.EXPORT
        if now >= self._next_preemption_s:
            self._next_preemption_s = now + _PREEMPTION_POLL_S
            found |= Request._LOOK
        return found
