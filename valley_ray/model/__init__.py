"""Model: frames' pixels and token ids become logits. torch and transformers: knows no Ray.

Importing this package makes AutoConfig, AutoModelForCausalLM and AutoModelForImageTextToText know `model_type` "valley".
"""

from valley_ray.model.config import ValleyConfig
from valley_ray.model.valley import ValleyCore, ValleyForConditionalGeneration

__all__ = ["ValleyConfig", "ValleyCore", "ValleyForConditionalGeneration"]
