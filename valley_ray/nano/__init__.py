"""Nano: generated videos with questions, and backbones small enough to be made on a CPU in minutes."""
