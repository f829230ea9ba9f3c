"""The one Ray Data execution of batch answers: blocks of questions → decoded by tasks → answered by a pool of actors.

Ray Data carries questions and places to the workers and statuses back; frames lie in shards, answers in the ledger.
"""

import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError

from valley_ray.data.execution import error_of_user
from valley_ray.data.stages import MAX_ATTEMPTS
from valley_ray.errors import ConfigError
from valley_ray.evaluate.config import AnswerSettings
from valley_ray.evaluate.stages import AnswerStage, LookStage


def answer_blocks(
    blocks: Sequence[pa.Table],
    look: LookStage,
    answer_arguments: tuple[Path, Path, Path, AnswerSettings],
    settings: AnswerSettings,
    *,
    stage: type[AnswerStage] = AnswerStage,
) -> Generator[list[dict[str, Any]], None, None]:
    """Statuses of the blocks (TASK_SCHEMA), a list per block, about in order; starts nothing where there is no work.

    Raises:
        ConfigError: Ray has fewer GPUs than one actor needs.
        ValleyError, ray.exceptions.RayError: a task failed for another reason than its rows, or too often.
    """
    if not blocks:
        return
    num_actors = min(num_actors_of(settings), len(blocks))
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Each death in the middle of a clip or an answer is one of its attempts: the stages bound them, Ray must let it.
    retries = settings.task_retries + MAX_ATTEMPTS * settings.block_size
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        answered = (
            ray.data.from_blocks(list(blocks))
            .map_batches(
                look.__call__,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=settings.decode_cpus,
                compute=ray.data.TaskPoolStrategy(size=_num_tasks(settings, num_actors, len(blocks))),
                max_retries=retries,
            )
            .map_batches(
                stage,
                fn_constructor_args=answer_arguments,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=settings.actor_cpus,
                num_gpus=settings.actor_gpus,
                compute=ray.data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=2),
                max_task_retries=retries,
            )
        )
    try:
        for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield batch.to_pylist()
    except RayError as error:
        raise error_of_user(error, settings="num_slots, block_size or max_decode_tasks") or error from None


def num_actors_of(settings: AnswerSettings) -> int:
    """Actors that hold the model: as many as were asked for, else one per GPU, or per two CPUs.

    Half of the CPUs are left to decoding. Raises ConfigError where not even one fits.
    """
    have = ray.cluster_resources()
    if have.get("GPU", 0.0) < settings.actor_gpus or have.get("CPU", 0.0) < settings.actor_cpus:
        raise ConfigError(
            f"an actor needs actor_cpus={settings.actor_cpus:g} and actor_gpus={settings.actor_gpus:g}, Ray has "
            f"{have.get('CPU', 0.0):g} and {have.get('GPU', 0.0):g}; lower them"
        )
    if settings.num_actors is not None:
        return settings.num_actors
    if settings.actor_gpus:
        return int(have["GPU"] / settings.actor_gpus)
    return max(1, int(have["CPU"] / 2 / settings.actor_cpus))


def _num_tasks(settings: AnswerSettings, num_actors: int, num_blocks: int) -> int:
    """Decoding tasks at once: one per CPU that the actors leave, on whatever nodes."""
    if settings.max_decode_tasks is not None:
        return min(settings.max_decode_tasks, num_blocks)
    left = ray.cluster_resources().get("CPU", 1.0) - num_actors * settings.actor_cpus
    return max(1, min(int(left), num_blocks))
