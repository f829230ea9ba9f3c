"""Items of the original's training set through our record files, decoding, tokenizing and batching.

The folders are the original's: images and videos under `media`, the working directory at the root of the set.
"""

import contextlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from parity_set import ROOT, expand_ids, expand_labels, load_json

from valley_ray.chat.sentencepiece import SentencePieceTokenizer
from valley_ray.chat.templates import SYSTEM_PROMPTS
from valley_ray.data.schema import FAILED, OK
from valley_ray.data.shards import Sample, WindowStore
from valley_ray.data.sources import join, read_records
from valley_ray.data.stages import BLOCK_SCHEMA, DecodeStage, TokenizeStage
from valley_ray.fetch import FetchPolicy
from valley_ray.media.preprocess import Crop, normalize
from valley_ray.media.sandbox import SandboxLimits
from valley_ray.processor import ProcessorConfig, ValleyProcessor
from valley_ray.train.packing import collate, make_clip

MEAN_TOLERANCE = 1e-4
"""Means over float32 pixels; the order of the additions differs."""
UPSTREAM_PATCH = 14
"""Patch side, pixels, that the original counts tokens with whatever the tower says (valley/data/dataset.py)."""


class Item:
    """One recorded item and what ours makes of its record."""

    def __init__(self, recorded, folder, backend):
        self.want, self.override = recorded["result"], recorded["config_override"]
        self.context = f"{recorded['record']['id']} {self.override}"
        folder.mkdir()
        records = folder / "records.json"
        records.write_text(json.dumps([recorded["record"]]), encoding="utf-8")
        clips, samples = join([read_records(records, media_root=ROOT / "media")])
        self.clips, samples = clips.to_pylist(), samples.to_pylist()
        outcomes = self._decode(folder, backend)
        store = WindowStore(folder)
        self.frames = [store.frames(one["shard"], one["row"]) for one in outcomes if one["status"] == OK]
        if self.override.get("multi_image") is False:
            # The original then reads the number of frames from the colours of the image.
            outcomes = [one | {"num_frames": self.frames[0].shape[-1]} for one in outcomes]
        by_id = {one["clip_id"]: one for one in outcomes}
        self.processor = self._processor()
        [self.row] = TokenizeStage(self.processor)(samples, by_id).to_pylist()

    @property
    def is_recorded(self):
        """Whether the original made something of it."""
        return isinstance(self.want, dict)

    @property
    def pixels(self):
        """float32 [T, 3, H, W] per clip."""
        config = self.processor.config
        return [normalize(frames, mean=config.image_mean, std=config.image_std) for frames in self.frames]

    def _processing(self, num_patches):
        image_crop = ProcessorConfig(num_patches=num_patches).image_crop
        if self.override.get("image_aspect_ratio") == "keep":
            image_crop = Crop(resample=image_crop.resample, fit="keep")
        return ProcessorConfig(
            num_patches=num_patches,
            image_crop=image_crop,
            prompt_style="upstream-train",
            system_prompt=SYSTEM_PROMPTS[self.override.get("conv_mode", "v1")],
        )

    def _processor(self):
        sizes = {tuple(side // UPSTREAM_PATCH for side in frames.shape[1:3]) for frames in self.frames} or {(1, 1)}
        [(rows, columns)] = sizes
        folder = min(path.parent for path in ROOT.glob("checkpoints/*/tokenizer.model"))
        return ValleyProcessor(SentencePieceTokenizer(folder), self._processing(rows * columns))

    def _decode(self, folder, backend):
        if not self.clips:
            return []
        stage = DecodeStage(
            directory=folder,
            fingerprint="",
            sampling=ProcessorConfig(num_patches=1).sampling,
            processing=self._processing(1),
            backend=backend,
            limits=SandboxLimits(),
            policy=FetchPolicy(),
        )
        rows = [{"window": 0, "block": 0} | {key: clip[key] for key in BLOCK_SCHEMA.names[2:]} for clip in self.clips]
        return stage(pa.Table.from_pylist(rows, schema=BLOCK_SCHEMA)).to_pylist()


@pytest.fixture(scope="module", params=["pyav", "decord"])
def items(request, tmp_path_factory):
    recorded = load_json("dataset.json")["items"]
    folder = tmp_path_factory.mktemp(request.param)
    with contextlib.chdir(ROOT):
        return [Item(one, folder / str(number), request.param) for number, one in enumerate(recorded)]


def test_ids_and_labels_of_every_item(items):
    for item in items:
        if not item.is_recorded:
            continue
        assert item.row["status"] == OK, (item.context, item.row["error"])
        ids = expand_ids(item.want["input_ids_rle"])
        assert item.row["input_ids"] == ids, item.context
        assert len(ids) == item.want["length"]
        labels = expand_labels(ids, item.want["kept_label_spans"])
        np.testing.assert_array_equal(item.row["labels"], labels, err_msg=item.context)


def test_pixels_of_every_item(items):
    for item in items:
        if not item.is_recorded or "image_shape" not in item.want:
            continue
        if not item.frames:
            # A text gets a black placeholder from the original, and nothing from ours.
            assert item.want["image_mean"] == 0, item.context
            continue
        [pixels] = item.pixels
        assert shape_like(pixels, item.want["image_shape"]) == item.want["image_shape"], item.context
        assert pixels.mean(dtype=np.float64) == pytest.approx(item.want["image_mean"], abs=MEAN_TOLERANCE), item.context


def test_items_that_the_original_drops_are_rows_with_a_reason(items):
    for item in items:
        if item.is_recorded:
            continue
        assert item.row["status"] == FAILED, item.context
        assert (item.row["input_ids"], item.row["clips"]) == ([], [])
        assert item.row["error_class"], item.context
        for clip in item.clips:
            if not Path(clip["uri"]).exists():
                assert item.row["error_class"] == "source_not_found", item.context
                assert clip["uri"] in item.row["error"], "it says where it was looked for"


def test_batches_have_the_recorded_shapes(items):
    for name, want in load_json("dataset.json").get("collated", {}).items():
        shapes = image_shapes(want["images"])
        chosen = [item_of_shape(items, shape) for shape in shapes]
        samples = [
            Sample(
                sample_id=item.row["sample_id"],
                input_ids=np.array(item.row["input_ids"]),
                labels=np.array(item.row["labels"]),
                frames=tuple(item.frames),
                num_label_tokens=item.row["num_label_tokens"],
            )
            for item in chosen
        ]
        clips = [
            make_clip((row, column), frames, pixel_values=item.processor.pixel_values, features=None)
            for row, item in enumerate(chosen)
            for column, frames in enumerate(item.frames)
        ]
        pad_token_id = chosen[0].processor.pad_token_id
        assert pad_token_id == want["pad_id"], name
        batch = collate(samples, clips, pad_token_id=pad_token_id)
        assert list(batch.input_ids.shape) == list(batch.labels.shape) == want["input_ids"], name
        # The original's mask is torch.bool and says where the id is not padding; ours holds the same as integers.
        assert batch.attention_mask.bool().equal(batch.input_ids != pad_token_id), name
        shown = [shape for shape, item in zip(shapes, chosen, strict=True) if item.frames]
        assert [shape_like(c.pixel_values, s) for c, s in zip(batch.clips, shown, strict=True)] == shown, name


def image_shapes(images):
    """Shapes per row, from a list of them or from the words "stacked [B, ...]"."""
    if not isinstance(images, str):
        return images
    num_rows, *shape = json.loads(images.removeprefix("stacked "))
    return [shape] * num_rows


def item_of_shape(items, shape):
    """The first item that has such pixels, those without an override before the others."""
    ordered = sorted(items, key=lambda item: bool(item.override))
    return next(item for item in ordered if item.is_recorded and item.want.get("image_shape") == shape)


def shape_like(pixels, recorded):
    """The shape of [T, 3, H, W] pixels, without T where the recorded one has none."""
    return list(pixels.shape)[-len(recorded) :]
