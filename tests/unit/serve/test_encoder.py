"""Visual tokens on their way from an encoder to a decoder."""

import pickle

import pytest
import torch
from ray import cloudpickle

from valley_ray.serve.encoder import EncodedMedia


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_travel_beside_the_message_and_are_the_receivers_own(dtype: torch.dtype) -> None:
    tokens = torch.randn(64, 2, 8).to(dtype)[:, 0]
    assert not tokens.is_contiguous()
    buffers: list[pickle.PickleBuffer] = []
    message = cloudpickle.dumps(EncodedMedia(tokens, None, 0.5), protocol=5, buffer_callback=buffers.append)
    assert len(message) < 1000
    store = [bytearray(one) for one in buffers]
    received = pickle.loads(message, buffers=store)
    for one in store:
        one[:] = bytes(len(one))
    assert received.tokens.dtype == dtype
    assert torch.equal(received.tokens, tokens)
    assert (received.decode_seconds, received.encode_seconds) == (None, 0.5)
