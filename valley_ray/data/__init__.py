"""Data: tables of clips and samples become committed windows of shards, with Ray Data."""
