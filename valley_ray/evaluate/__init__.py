"""Evaluate: a data set and a model become answers and scores."""
