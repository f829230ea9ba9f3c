"""Where media and chat meet: frames become pixel values, conversations become token ids and labels."""

from valley_ray.processor.config import ProcessorConfig
from valley_ray.processor.processor import ValleyProcessor
from valley_ray.processor.reading import read_processor_config

__all__ = ["ProcessorConfig", "ValleyProcessor", "read_processor_config"]
