"""The one Ray Data execution of the pipeline: blocks of paths → outcomes, decoded on whatever CPUs are free.

Ray Data carries paths to the workers and outcomes back; frames go from a worker's decoder to its shard on disk.
"""

import contextlib
import os
import re
import socket
import time
import warnings
from collections.abc import Generator, Sequence

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError
from ray.util.metrics import Histogram

from valley_ray import errors
from valley_ray.data.outcomes import Outcome
from valley_ray.data.stages import MAX_ATTEMPTS, DecodeStage
from valley_ray.errors import DataError, StorageError, ValleyError

_RAISED = re.compile(r"^(?:\w*Error: \[Errno (?P<errno>\d+)\]|valley_ray\.errors\.(?P<name>\w+): (?P<text>.+))", re.M)
"""Last line of a traceback."""
NODE_ANSWERS_S = 3.0
"""Seconds in which a node that lives takes a connection."""
BLOCK_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)
"""Buckets of the dashboard's histogram of a block's time."""


def decode_blocks(
    blocks: Sequence[pa.Table],
    stage: DecodeStage,
    *,
    num_cpus: float,
    max_tasks: int | None,
    retries: int,
    block_size: int,
) -> Generator[list[Outcome], None, None]:
    """Outcomes of the blocks, a list per block, about in order; starts nothing where there is nothing to do.

    Args:
        blocks: tables of BLOCK_SCHEMA with at most `block_size` rows, each the work of one task.
        num_cpus: what a task reserves.
        max_tasks: tasks at once; None: as many as fit, on a cluster of one node at most one per CPU.
        retries: how often a block is begun again after its worker or node died, beside what its clips may cost.

    Raises:
        StorageError: a worker could not write (a full disk, say).
        DataError: workers died, or nodes ran out of memory, more often than they may.
        ValleyError, ray.exceptions.RayError: a task failed for another reason than its clips, or too often.
    """
    if not blocks:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def decode(block: pa.Table) -> pa.Table:
        start = time.perf_counter()
        outcomes = stage(block, node=ray.get_runtime_context().get_node_id(), is_alive=is_node_alive)
        seconds = Histogram("valley_data_block_seconds", "Time to decode a block of clips.", list(BLOCK_SECONDS))
        seconds.observe(time.perf_counter() - start)
        return outcomes

    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # Ray offers no other way yet to bound the retries, which are endless by default.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        # from_arrow would ask tasks how long each table is, which costs a cold worker two seconds.
        decoded = ray.data.from_blocks(list(blocks)).map_batches(
            decode,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=num_cpus,
            compute=ray.data.TaskPoolStrategy(size=_num_tasks(max_tasks, len(blocks))),
            # Each death in the middle of a clip is one of its attempts: the stage bounds them, and Ray must let it.
            max_retries=retries + MAX_ATTEMPTS * block_size,
        )
    del blocks  # they lie in the object store now
    try:
        # Without prefetching, so that a window need not wait for the block after its last.
        for batch in decoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield batch.to_pylist()
    except RayError as error:
        raise error_of_user(error, settings="max_decode_tasks or sandbox.memory_bytes") or error from None


def error_of_user(error: RayError, *, settings: str) -> ValleyError | None:
    """What a task raised on purpose, or could not do for want of disk or memory; None for whatever else ended it.

    `settings` are those by which a user makes the task take less memory.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ValleyError):
            return cause
        if isinstance(cause, OutOfMemoryError):
            return DataError(f"a node ran out of memory too often; set {settings} lower")
        if isinstance(cause, WorkerCrashedError):
            return DataError("workers died too often before they began; their logs say why")
        if isinstance(cause, OSError) and cause.strerror:
            return _not_written(cause.strerror)
        cause = getattr(cause, "cause", None) or cause.__cause__
    return _told(str(error))


def _told(trace: str) -> ValleyError | None:
    """The same from a worker's traceback: Ray Data wraps what a task raises, and drops the cause on the way."""
    for match in reversed(list(_RAISED.finditer(trace))):
        if match["errno"]:
            return _not_written(os.strerror(int(match["errno"])))
        error_class = getattr(errors, match["name"], None)
        if isinstance(error_class, type) and issubclass(error_class, ValleyError):
            return error_class(match["text"])
    return None


def _not_written(reason: str) -> StorageError:
    return StorageError(f"a worker could not write ({reason}); make room or check the folder's rights")


def cpus_of_one_node() -> int | None:
    """Tasks at once that keep every CPU busy, where one node is all there is; None on a cluster of several.

    A task keeps one CPU busy. Where fractions are reserved, more tasks fit; they are no faster, but Ray starts cold
    workers for them, which cost a second of CPU each and later push out the warm ones and their decoding children. The
    blocks of the first window among them come last: on two busy cores it came after 11 to 21 s instead of 6 s.
    """
    if sum(node["Alive"] for node in ray.nodes()) > 1:
        return None
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def is_node_alive(node_id: str) -> bool:
    """Whether a node runs. Ray itself may learn of a power cut half a minute after the tasks of that node are begun
    again elsewhere, so the node is asked too."""
    for node in ray.nodes():
        if node["NodeID"] == node_id and node["Alive"]:
            with contextlib.suppress(OSError):
                socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), NODE_ANSWERS_S).close()
                return True
    return False


def _num_tasks(max_tasks: int | None, num_blocks: int) -> int | None:
    """Tasks at once, where bounded."""
    bound = max_tasks if max_tasks is not None else cpus_of_one_node()
    return min(bound, num_blocks) if bound is not None else None
