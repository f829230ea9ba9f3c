"""Prompts, token ids and labels against those that the original recorded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity_set import ROOT, expand_ids, expand_labels, load_json, require_set

from valley_ray.chat import Encoded, upstream
from valley_ray.chat.conversation import Conversation, from_valley_record
from valley_ray.chat.sentencepiece import SentencePieceTokenizer
from valley_ray.chat.templates import SYSTEM_PROMPTS
from valley_ray.chat.tokens import IM_PATCH, tokenize
from valley_ray.processor import ProcessorConfig, ValleyProcessor


def text_files() -> list[str]:
    """The text files that the set has; skips the test where it has none."""
    require_set()
    present = sorted(path.name for path in ROOT.glob("text*.json"))
    if not present:
        pytest.skip(f"{ROOT} holds no text*.json")
    return present


def tokenizer_folder(file: str) -> Path:
    """text.json goes with the checkpoints' tokenizer, text_a_b.json with tokenizers/a-b, or the only one there."""
    _, _, name = Path(file).stem.partition("_")
    if not name:
        return min(path.parent for path in ROOT.glob("checkpoints/*/tokenizer.model"))
    named = ROOT / "tokenizers" / name.replace("_", "-")
    return named if named.is_dir() else min(path.parent for path in ROOT.glob("tokenizers/*/tokenizer.model"))


def test_training_prompts_ids_and_labels_equal_the_recorded_ones() -> None:
    for file, tokenizer, recorded, records in text_sets():
        num_patches = patches_of(recorded["cases"], tokenizer)
        for case in recorded["cases"]:
            context = f"{file} {case['id']} {case['conv_mode']} {case['model_max_length']}"
            conversation = from_valley_record(records[case["id"]])
            num_frames = frames_of(case, records[case["id"]], conversation)
            processor = make_processor(
                tokenizer,
                num_patches=num_patches,
                system_prompt=SYSTEM_PROMPTS[case["conv_mode"]],
                max_length=case["model_max_length"],
            )
            if "prompt" in case:
                text = upstream.training_text(conversation, processor.prompt_options(num_frames))
                assert text == case["prompt"], context
            assert_encoded(processor.encode_training(conversation, num_frames), case, context)
            if "kept_label_spans_only_mask_system" in case:
                learns_users = with_switch(processor, only_mask_system=True)
                encoded = learns_users.encode_training(conversation, num_frames)
                assert_encoded(encoded, case, context, spans="kept_label_spans_only_mask_system")


def test_another_begin_token_gives_the_recorded_ids() -> None:
    for file, tokenizer, recorded, records in text_sets():
        processor = make_processor(tokenizer, num_patches=patches_of(recorded["cases"], tokenizer))
        for case in recorded.get("llama_in_path_quirk", []):
            conversation = from_valley_record(records[case["id"]])
            assert case["bos_id"] == tokenizer.eos_token_id, "the original takes the end token"
            encoded = with_switch(processor, bos_token="eos").encode_training(
                conversation, frames_of(case, records[case["id"]], conversation)
            )
            assert_encoded(encoded, case, f"{file} {case['id']}")


def test_two_records_tokenized_together_give_the_recorded_ids() -> None:
    """The last header's length counts for all records of a batch: the same here, where a row knows no other row."""
    for file, tokenizer, recorded, records in text_sets():
        processor = make_processor(tokenizer, num_patches=patches_of(recorded["cases"], tokenizer))
        batch = recorded.get("batch_of_two_text_records", [])
        known = {
            tuple(processor.encode_training(from_valley_record(record), []).input_ids.tolist()): record
            for record in records.values()
            if not {"video", "image"} & set(record)
        }
        for place, case in enumerate(batch):
            record = known.get(tuple(expand_ids(case["input_ids_rle"])))
            assert record is not None, f"{file}: row {place} of the batch is none of the text-only records"
            assert_encoded(processor.encode_training(from_valley_record(record), []), case, f"{file} row {place}")


def test_tokenizer_probes_give_the_ids_and_texts_of_the_slow_tokenizer() -> None:
    for _, tokenizer, recorded, _ in text_sets():
        for probe in recorded.get("tokenizer_probes", []):
            ids = tokenize(tokenizer, probe["text"], bos_token_id=tokenizer.bos_token_id)
            assert ids == probe["slow"], probe["text"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == probe["slow_decode"], probe["text"]


def text_sets() -> Iterator[tuple[str, SentencePieceTokenizer, dict[str, Any], dict[str, dict[str, Any]]]]:
    """Each text file with its tokenizer, its content and the records by id."""
    for file in text_files():
        recorded = load_json(file)
        records = recorded.get("records") or load_json("text.json")["records"]
        yield (
            file,
            SentencePieceTokenizer(tokenizer_folder(file)),
            recorded,
            {record["id"]: record for record in records},
        )


def make_processor(tokenizer: SentencePieceTokenizer, **settings: Any) -> ValleyProcessor:
    """A processor of the original's training style."""
    return ValleyProcessor(tokenizer, ProcessorConfig(prompt_style="upstream-train", **settings))


def with_switch(processor: ValleyProcessor, **switch: Any) -> ValleyProcessor:
    """The same processor with one setting changed."""
    return ValleyProcessor(processor.tokenizer, processor.config.model_copy(update=switch))


def assert_encoded(encoded: Encoded, case: dict[str, Any], context: str, spans: str = "kept_label_spans") -> None:
    """Ids and labels of `encoded` are the recorded ones."""
    ids = expand_ids(case["input_ids_rle"])
    assert encoded.input_ids.tolist() == ids, context
    assert case.get("length", len(ids)) == len(ids), context
    np.testing.assert_array_equal(encoded.labels, expand_labels(ids, case[spans]), err_msg=f"{context} {spans}")


def frames_of(case: dict[str, Any], record: dict[str, Any], conversation: Conversation) -> list[int]:
    """The original fills every mark of a record with one frame count: 1 for an image, else 8 unless said."""
    count = case.get("num_frames") or (1 if "image" in record else 8)
    return [count] * conversation.num_media


def patches_of(cases: list[dict[str, Any]], tokenizer: SentencePieceTokenizer) -> int:
    """Patches per visual block: the longest run of patch placeholders in the recorded ids."""
    patch = tokenizer.get_added_vocab()[IM_PATCH]
    return max(count for case in cases for token, count in case["input_ids_rle"] if token == patch)
