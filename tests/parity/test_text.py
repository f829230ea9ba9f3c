"""Prompts, token ids and labels against those that the original recorded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity_set import ROOT, expand_ids, expand_labels, load_json, require_set

from valley_ray.chat import upstream
from valley_ray.chat.conversation import Conversation, from_valley_record
from valley_ray.chat.sentencepiece import SentencePieceTokenizer
from valley_ray.chat.templates import SYSTEM_PROMPTS
from valley_ray.chat.tokens import IM_PATCH, tokenize

TEXT_FILES = {"text.json": None, "text_llama_like_hashes.json": "tokenizers/llama-like-hashes"}


def text_files() -> list[tuple[str, str | None]]:
    """Those of the text files that the set has; skips the test where it has none."""
    require_set()
    present = [(file, named) for file, named in TEXT_FILES.items() if (ROOT / file).is_file()]
    if not present:
        pytest.skip(f"{ROOT} holds none of {', '.join(TEXT_FILES)}")
    return present


def tokenizer_folder(named: str | None) -> Path:
    """The named tokenizer, or that of the first checkpoint that has one."""
    if named is not None:
        return ROOT / named
    return min(path.parent for path in ROOT.glob("checkpoints/*/tokenizer.model"))


def test_training_prompts_ids_and_labels_equal_the_recorded_ones() -> None:
    for file, named in text_files():
        recorded = load_json(file)
        tokenizer = SentencePieceTokenizer(tokenizer_folder(named))
        records = {record["id"]: record for record in load_json("text.json")["records"]}
        num_patches = patches_of(recorded["cases"], tokenizer)
        for case in recorded["cases"]:
            context = f"{file} {case['id']} {case['conv_mode']} {case['model_max_length']}"
            conversation = from_valley_record(records[case["id"]])
            options = {
                "system_prompt": SYSTEM_PROMPTS[case["conv_mode"]],
                "num_patches": num_patches,
                "num_frames": frames_of(case, records[case["id"]], conversation),
            }
            if "prompt" in case:
                assert upstream.training_text(conversation, **options) == case["prompt"], context
            for name, mask_system_only in (("", False), ("_only_mask_system", True)):
                if f"kept_label_spans{name}" not in case:
                    continue
                encoded = upstream.encode_training(
                    tokenizer,
                    conversation,
                    **options,
                    max_length=case["model_max_length"],
                    mask_system_only=mask_system_only,
                )
                ids = expand_ids(case["input_ids_rle"])
                assert encoded.input_ids.tolist() == ids, context
                labels = expand_labels(ids, case[f"kept_label_spans{name}"])
                np.testing.assert_array_equal(encoded.labels, labels, err_msg=context)


def test_another_begin_token_gives_the_recorded_ids() -> None:
    for file, named in text_files():
        recorded = load_json(file)
        tokenizer = SentencePieceTokenizer(tokenizer_folder(named))
        records = {record["id"]: record for record in load_json("text.json")["records"]}
        num_patches = patches_of(recorded["cases"], tokenizer)
        for case in recorded.get("llama_in_path_quirk", []):
            conversation = from_valley_record(records[case["id"]])
            ids = expand_ids(case["input_ids_rle"])
            encoded = upstream.encode_training(
                tokenizer,
                conversation,
                system_prompt=SYSTEM_PROMPTS["v1"],
                num_patches=num_patches,
                num_frames=frames_of(case, records[case["id"]], conversation),
                max_length=2048,
                bos_token_id=case["bos_id"],
            )
            assert encoded.input_ids.tolist() == ids, case["id"]
            np.testing.assert_array_equal(encoded.labels, expand_labels(ids, case["kept_label_spans"]), case["id"])


def test_tokenizer_probes_give_the_ids_and_texts_of_the_slow_tokenizer() -> None:
    for file, named in text_files():
        tokenizer = SentencePieceTokenizer(tokenizer_folder(named))
        for probe in load_json(file).get("tokenizer_probes", []):
            ids = tokenize(tokenizer, probe["text"], bos_token_id=tokenizer.bos_token_id)
            assert ids == probe["slow"], probe["text"]


def frames_of(case: dict[str, Any], record: dict[str, Any], conversation: Conversation) -> list[int]:
    """The original fills every mark of a record with one frame count: 1 for an image, else 8 unless said."""
    count = case.get("num_frames") or (1 if "image" in record else 8)
    return [count] * conversation.num_media


def patches_of(cases: list[dict[str, Any]], tokenizer: SentencePieceTokenizer) -> int:
    """Patches per visual block: the longest run of patch placeholders in the recorded ids."""
    patch = tokenizer.get_added_vocab()[IM_PATCH]
    return max(count for case in cases for token, count in case["input_ids_rle"] if token == patch)
