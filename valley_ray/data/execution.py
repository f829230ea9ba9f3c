"""The one Ray Data execution of the pipeline: blocks of paths → outcomes, decoded on whatever CPUs are free.

Ray Data carries paths to the workers and outcomes back; frames go from a worker's decoder to its shard on disk.
"""

import warnings
from collections.abc import Generator, Sequence

import pyarrow as pa
import ray
import ray.data

from valley_ray.data.stages import DecodeStage
from valley_ray.data.windows import Outcome


def decode_blocks(
    blocks: Sequence[pa.Table], stage: DecodeStage, *, num_cpus: float, max_tasks: int | None, retries: int
) -> Generator[list[Outcome], None, None]:
    """Outcomes of the blocks, a list per block, about in order; starts nothing where there is nothing to do.

    Args:
        blocks: tables of BLOCK_SCHEMA, each the work of one task.
        num_cpus: what a task reserves.
        max_tasks: tasks at once; None: as many as fit, on a cluster of one node at most one per CPU.
        retries: how often a block is begun again after its worker or node died.

    Raises:
        ray.exceptions.RayError: a task failed for another reason than its clips, or too often.
    """
    if not blocks:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # Ray offers no other way yet to bound the retries, which are endless by default.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        decoded = ray.data.from_arrow(list(blocks)).map_batches(
            stage,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=num_cpus,
            concurrency=max_tasks or _default_tasks(),
            max_retries=retries,
        )
    # Without prefetching, so that a window need not wait for the block after its last.
    for batch in decoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield batch.to_pylist()


def _default_tasks() -> int | None:
    """One per CPU where one node is all there is.

    A task keeps one CPU busy. Where fractions are reserved, more tasks fit; they are no faster, but Ray starts cold
    workers for them and gives them blocks of the first window, which then comes last: on two busy cores it came after
    11 to 21 s instead of 6 s.
    """
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    return max(1, int(ray.cluster_resources().get("CPU", 1))) if num_nodes == 1 else None
