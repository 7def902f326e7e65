"""Text-only conversations whose answers are the decoder's own, so that training keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from llava_interleave import load

TOPICS = (
    "the sea", "a lost key", "winter", "bread", "an old clock", "the moon", "a small village",
    "friendship", "trains", "a garden", "music", "rain", "a brave mouse", "mountains", "coffee",
    "learning", "books", "a long journey", "bicycles", "the sun", "computers", "photosynthesis",
    "gravity", "volcanoes", "democracy", "the heart", "vaccines", "recycling", "sleep", "dreams",
)  # fmt: skip
FORMS = (
    "Write a short poem about {}.", "Tell me a story about {} in three sentences.",
    "Explain {} to a child.", "Give me three facts about {}.", "What do you know about {}?",
    "Write one sentence about {}.", "Why do people care about {}?", "What comes to mind about {}?",
)  # fmt: skip
COUNT = 100
"""Of the questions about topics."""
FIXED = (
    "Hello!", "Hi, how are you?", "Hello, who are you?", "What can you do?", "Who made you?",
    "Thank you!", "Good morning.", "What is your name?", "Tell me a joke.", "What is 2 + 2?",
    "What is the capital of France?", "What is the capital of Japan?", "How many days has a week?",
    "Translate 'good morning' to Spanish.", "Name three colors.", "Name three fruits.",
    "What is the largest planet?", "Who wrote Romeo and Juliet?", "What is water made of?",
    "Give me tips for better sleep.", "How do I boil an egg?", "How do I learn to code?",
    "Write a Python function that adds two numbers.", "What is machine learning?", "Goodbye!",
    "What is the opposite of hot?", "List the seasons.", "How tall is Mount Everest?",
    "Correct this sentence: he go to school.", "Summarize: The cat sat on the mat and slept.",
    "Is the earth round?", "What should I cook tonight?", "Recommend a book.", "I am sad today.",
)  # fmt: skip


def write(model: Path, target: Path, seed: int = 0) -> None:
    """Ask the decoder all of it; answers that are too long end with their last whole sentence."""
    rng = Random(seed)
    questions = [*FIXED, *rng.sample([f.format(t) for f in FORMS for t in TOPICS], COUNT)]
    bot = load(model, precision="bfloat16")
    answers = bot.batch([[{"role": "user", "content": q}] for q in questions], max_new_tokens=60)
    with target.open("w", encoding="utf-8") as file:
        for question, answer in zip(questions, answers, strict=True):
            text = answer.text.strip()
            if answer.finish_reason == "length":
                text = text[: text.rfind(". ") + 1]
            if len(text) > 2:
                rows = [{"role": "user", "content": question}]
                file.write(json.dumps([*rows, {"role": "assistant", "content": text}]) + "\n")


def read(path: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
