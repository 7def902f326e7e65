"""Answer the same question about many images; requests are batched continuously.

python examples/batch.py demo/*.png
"""

import sys
import time

from llava_interleave import load

paths = sys.argv[1:]
bot = load()
conversations = [bot.turn("How many things are there?", [path]) for path in paths]
began = time.perf_counter()
answers = bot.batch(conversations, max_new_tokens=32)
seconds = time.perf_counter() - began
for path, answer in zip(paths, answers, strict=True):
    print(f"{path}: {answer}")
tokens = sum(len(answer.tokens) for answer in answers)
print(f"{tokens} tokens in {seconds:.2f} s")
