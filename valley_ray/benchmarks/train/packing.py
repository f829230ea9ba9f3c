"""Tokens per CPU-second of packed rows over padded batches of 16, of the same samples, forward and backward.

Random text of such lengths that half of a padded batch is padding. One thread. Knows no Ray, no files, no media.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from valley_ray.benchmarks.train.config import TrainCost
from valley_ray.data.shards import Sample
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.config import ID_FIELD_OF_TOKEN, ValleyConfig
from valley_ray.train.packing import IGNORED, MicroBatch, collate, collate_packed
from valley_ray.train.plan import pack

NUM_SAMPLES, BATCH_SIZE = 32, 16
SHORTEST, LONGEST, BEND = 32, 512, 1.4
"""Lengths are SHORTEST + u ** BEND of the way to LONGEST, u even in [0, 1): half of a batch of 16 is padding."""
PACK_TOKENS = LONGEST
"""On a CPU attention costs what the whole row squared costs."""
VOCABULARY = 2000
LOSS_RTOL = 1e-5
"""Packed and padded sums of a loss; both are float32."""

_IDS = {field: VOCABULARY + place for place, field in enumerate(ID_FIELD_OF_TOKEN.values())}


@dataclass(frozen=True)
class PassCost:
    """One pass over all samples."""

    cpu_s: float
    wall_s: float
    loss: float


def packing_numbers(config: TrainCost, *, say: Callable[[str], None]) -> dict[str, object]:
    """`packed_vs_padded`, `padding_waste` and tokens per CPU-second; the caller sets torch's threads.

    Raises AssertionError where the two give other losses: then there is nothing to compare.
    """
    core = _make_core()
    samples = make_samples(NUM_SAMPLES)
    kinds = {"padded": _padded(samples), "packed": _packed(samples)}
    num_tokens = sum(len(sample.input_ids) for sample in samples)
    room = sum(batch.input_ids.numel() for batch in kinds["padded"])
    losses = [_pass(core, batches).loss for batches in kinds.values()]
    assert np.isclose(losses[0], losses[1], rtol=LOSS_RTOL), f"packed rows give another loss than padded ones: {losses}"
    say(f"{'tokens per CPU-second':<24}{'padded':>10}{'packed':>10}{'ratio':>8}")
    rounds = []
    for _ in range(config.num_rounds_packing):
        costs = {kind: _pass(core, batches) for kind, batches in kinds.items()}
        rounds.append(costs)
        rates = [num_tokens / costs[kind].cpu_s for kind in ("padded", "packed")]
        say(f"{'':<24}{rates[0]:>10.0f}{rates[1]:>10.0f}{rates[1] / rates[0]:>8.2f}")
    per_cpu_s = {kind: num_tokens / median(one[kind].cpu_s for one in rounds) for kind in kinds}
    return {
        "packed_vs_padded": median(one["padded"].cpu_s / one["packed"].cpu_s for one in rounds),
        "packed_vs_padded_wall": median(one["padded"].wall_s / one["packed"].wall_s for one in rounds),
        "padding_waste": 1 - num_tokens / room,
        "packing_tokens_per_cpu_s": per_cpu_s,
    }


def make_samples(count: int) -> list[Sample]:
    """Random text, its last third learned."""
    random = np.random.default_rng(0)
    samples = []
    for number, way in enumerate(random.random(count)):
        length = int(SHORTEST + (LONGEST - SHORTEST) * way**BEND)
        input_ids = random.integers(3, VOCABULARY, length)
        labels = np.where(np.arange(length) >= 2 * length // 3, input_ids, IGNORED)
        samples.append(Sample(str(number), input_ids, labels, (), int((labels != IGNORED).sum())))
    return samples


def _padded(samples: Sequence[Sample]) -> list[MicroBatch]:
    batches = (samples[first : first + BATCH_SIZE] for first in range(0, len(samples), BATCH_SIZE))
    return [collate(batch, (), pad_token_id=0) for batch in batches]


def _packed(samples: Sequence[Sample]) -> list[MicroBatch]:
    rows = pack([len(sample.input_ids) for sample in samples], PACK_TOKENS)
    return [collate_packed([samples[place] for place in row], ()) for row in rows]


def _pass(core: Any, batches: Sequence[MicroBatch]) -> PassCost:
    core.zero_grad()
    cpu, wall, loss = time.process_time(), time.perf_counter(), 0.0
    for batch in batches:
        inputs = batch.model_inputs(torch.device("cpu"), attention="sdpa")
        output = core(**inputs, loss_reduction="sum", return_logits=False)
        output.loss.backward()
        loss += float(output.loss.detach())
    return PassCost(time.process_time() - cpu, time.perf_counter() - wall, loss)


def _make_core() -> Any:
    torch.manual_seed(0)
    config = ValleyConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY + len(_IDS),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LONGEST,
        ),
        **_IDS,
    )
    return ValleyForConditionalGeneration(config).core.train()
