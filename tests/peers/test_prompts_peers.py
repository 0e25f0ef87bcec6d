"""What tests/oracles/prompts/expected.json holds is what IDEFICS's processor and transformers' tokenizers make."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import IdeficsImageProcessor, IdeficsProcessor, PreTrainedTokenizerFast

CASES = Path(__file__).parent.parent / "oracles" / "prompts"
EXPECTED = json.loads((CASES / "expected.json").read_text())

A, B = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
END = "<end_of_utterance>\n"
IDEFICS: dict[str, list[list[Any]]] = {  # as its model card and its documentation write them
    "captions": [[A, "Output: a dog\n", B, "Output: two kittens\n", A, "Output:"], [B, "Output:"]],
    "questions": [[A, "Question: What is this? Answer: a dog\n", B, "Question: And this? Answer:"]],
    "chat": [
        ["User:", A, "Describe this image.\nAssistant: An image of two kittens.\nUser:", B, "And this?\nAssistant:"]
    ],
    "instruct": [
        ["User:", A, f"What is in this image?{END}Assistant: This picture depicts Idefix.{END}User: And what colour?"
         f"{END}Assistant:"]
    ],
    "neighbours": [["User:", A, B, "Which one is older?\nAssistant:"]],
    "instruct captions": [
        ["User:", A, f"Describe the image briefly.{END}Assistant: a dog{END}User:", B, f"Describe the image briefly."
         f"{END}Assistant:"]
    ],
}  # fmt: skip
CHUNK = "<|endofchunk|><image>"
OPEN_FLAMINGO = {  # as open_flamingo/eval writes them
    "captions": [f"<image>Output:a dog{CHUNK}Output:two kittens{CHUNK}Output:", "<image>Output:"],
    "questions": [f"<image>Question:What is this? Short answer:a dog{CHUNK}Question:And this? Short answer:"],
}


@pytest.mark.parametrize("kind", ["legacy", "first"])
def test_idefics_processor(kind: str) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(CASES / f"idefics_{kind}.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<unk>", padding_side="left",
    )  # fmt: skip
    processor = IdeficsProcessor(IdeficsImageProcessor(image_size=8), tokenizer)
    for name, prompts in IDEFICS.items():
        got = processor(text=prompts, add_end_of_utterance_token=False, return_tensors="pt")
        expected = EXPECTED["idefics"][kind][name]
        assert got["input_ids"].tolist() == expected["ids"]
        assert got["attention_mask"].tolist() == expected["mask"]
        assert got["image_attention_mask"].int().tolist() == expected["images"]


@pytest.mark.parametrize(("kind", "bos"), [("neox", None), ("opt", "</s>")])
def test_open_flamingos_tokens(kind: str, bos: str | None) -> None:
    """With the tokens that its factory adds."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(CASES / f"open_flamingo_{kind}.json"), bos_token=bos, padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    for name, prompts in OPEN_FLAMINGO.items():
        got = tokenizer(prompts, padding="longest", return_tensors="pt")
        expected = EXPECTED["open_flamingo"][kind][name]
        assert got["input_ids"].tolist() == expected["ids"]
        assert got["attention_mask"].tolist() == expected["mask"]
