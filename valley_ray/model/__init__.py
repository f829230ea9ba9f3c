"""Model: frames' pixels and token ids become logits. torch and transformers: knows no Ray.

Importing this package makes AutoConfig, AutoModelForCausalLM and AutoModelForImageTextToText know the model type
"valley".
"""

from valley_ray.model.config import ValleyConfig
from valley_ray.model.core import ValleyCore
from valley_ray.model.valley import ValleyForConditionalGeneration

__all__ = ["ValleyConfig", "ValleyCore", "ValleyForConditionalGeneration"]
