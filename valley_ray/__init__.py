"""valley_ray: the Valley video assistant as one Ray platform.

Importing this package imports nothing heavy; each room is imported by its own name, for example
``valley_ray.assistant`` for answers in one process or ``valley_ray.train.trainer`` for training.
"""

__version__ = "0.1.0"
