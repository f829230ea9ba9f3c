"""Which features beside the shards a training reads instead of frames."""

import logging
from pathlib import Path

from valley_ray.data.feature_store import FeatureStore, feature_sets
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.frozen_tower import tower_key
from valley_ray.processor import ValleyProcessor

logger = logging.getLogger(__name__)


def stored_features(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor, shards_dir: Path
) -> FeatureStore | None:
    """Features beside the shards that are this model's own; None where there are none."""
    if not (sets := feature_sets(shards_dir)):
        return None
    key = tower_key(model.vision_tower, model.config, image_mean=processor.image_mean, image_std=processor.image_std)
    stored = FeatureStore.of_tower(shards_dir, key, takes_pooled=model.config.pooling == "mean")
    names = ", ".join(one.name for one in (stored.sets if stored is not None else sets))
    logger.info("features beside the shards are %s: %s", "used" if stored else "no use to this model", names)
    return stored
