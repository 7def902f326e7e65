"""Print an answer while it is generated, then sample three others.

python examples/stream.py demo/shapes.png
"""

import sys

from llava_interleave import Options, load

bot = load()
messages = bot.turn("What is in the image?", sys.argv[1:])
for delta in bot.stream(messages, max_new_tokens=64):
    print(delta.text, end="", flush=True)
    if delta.answer:
        print(f"\n{delta.answer.timings.tokens_per_second:.0f} tokens/s")

options = Options(n=3, temperature=1.0, top_p=0.9, seed=1, max_new_tokens=32)
for number, answer in enumerate(bot.choices(messages, options), 1):
    print(f"{number}. {answer}")
