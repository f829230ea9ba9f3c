"""Serve: HTTP requests become streamed answers, with Ray Serve replicas that scale apart."""
