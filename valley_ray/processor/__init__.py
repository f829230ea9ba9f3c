"""Where media and chat meet: frames become pixel values, conversations become token ids and labels."""

from valley_ray.processor.config import ProcessorConfig, read_processor_config
from valley_ray.processor.processor import ValleyProcessor

__all__ = ["ProcessorConfig", "ValleyProcessor", "read_processor_config"]
