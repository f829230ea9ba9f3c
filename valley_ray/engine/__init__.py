"""Engine: prompts become streams of tokens. torch, no Ray: the one sampling loop of the house."""
