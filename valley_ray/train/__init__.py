"""Train: shards become a model folder, with Ray Train and DeepSpeed."""
