"""Model: frames' pixels and token ids become logits. torch and transformers: knows no Ray."""
