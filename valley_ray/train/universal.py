"""DeepSpeed's checkpoint of one world size → its universal form, which any other world size opens.

Only needed when the number of ranks has changed. The work is done once per node, into its temporary folder.
"""

import contextlib
import hashlib
import io
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import ray.train
import ray.train.collective
import torch

from valley_ray.errors import TrainingError


def universal_form(checkpoint: Path, output: Path, *, tag: str) -> None:
    """Write the universal form of `checkpoint`/`tag` (the parts of all ranks in one folder) to `output`/`tag`.

    Reads one rank's part at a time; `output` takes as much disk as the checkpoint, for a while twice.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(output, ignore_errors=True)
    settings = Namespace(
        input_folder=str(checkpoint / tag),
        output_folder=str(output / tag),
        # More would be forked off a process with Ray's threads.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(settings)


def is_any_world(checkpoint: Path, tag: str) -> bool:
    """Whether every rank's part is the same, as ZeRO 0 has it: such a checkpoint opens for any number of ranks."""
    return not list((checkpoint / tag).glob("*_optim_states.pt"))


@contextlib.contextmanager
def on_this_node(checkpoint: Path, *, tag: str) -> Iterator[Path]:
    """The universal form of `checkpoint` for the time of the `with` block, made by one worker of every node; called
    by all workers of a training.

    Raises:
        TrainingError: a node's disk could not take it, or the checkpoint is damaged; another attempt may do.
    """
    name = hashlib.sha256(str(checkpoint).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"valley-universal-{name}"
    is_maker = ray.train.get_context().get_local_rank() == 0
    if is_maker:
        try:
            universal_form(checkpoint, folder, tag=tag)
        except (OSError, RuntimeError, AssertionError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"the checkpoint {checkpoint} cannot be opened for {ray.train.get_context().get_world_size()} workers: "
                f"{type(error).__name__}: {error}"
            ) from error
    try:
        ray.train.collective.barrier()
        yield folder
        ray.train.collective.barrier()
    finally:
        if is_maker:
            shutil.rmtree(folder, ignore_errors=True)


def trained_values(checkpoint: Path, *, tag: str) -> dict[str, torch.Tensor]:
    """What the stage of a checkpoint has trained, float32 by name in the core (`vision_tower.` before those of the
    tower), flat where ZeRO-3 wrote it; for those who have no engine."""
    model_file = next((checkpoint / tag).glob("*_model_states.pt"))
    # DeepSpeed keeps its version and configuration as objects beside the tensors; the file is the run's own.
    state = torch.load(model_file, map_location="cpu", weights_only=False)
    buffers = set(state.get("buffer_names") or ())
    if is_any_world(checkpoint, tag):
        values = {name: value for name, value in state["module"].items() if name not in buffers}
    else:
        with tempfile.TemporaryDirectory(prefix="valley-universal-") as name:
            universal_form(checkpoint, Path(name), tag=tag)
            files = sorted((Path(name) / tag / "zero").glob("*/fp32.pt"))
            values = {file.parent.name: torch.load(file, map_location="cpu")["param"] for file in files}
            values = {name: value for name, value in values.items() if name not in buffers}
    return {name.removeprefix("core."): value.float() for name, value in values.items()}
