"""Ray Train and DeepSpeed: committed windows in, a trained model folder out. Reads shards, never imports Ray Data."""
