"""Compare two images in a conversation; the second question reuses the KV cache of the first.

python examples/compare_two.py demo/before.png demo/after.png
"""

import sys

from llava_interleave import load

chat = load().conversation()
chat.attach(*sys.argv[1:3])
for question in ("What changed?", "How many things are there in image 2?"):
    answer = chat.ask(question, max_new_tokens=64)
    print(f"> {question}\n{answer}")
    print(f"  {answer.usage.cached} of {answer.usage.prompt} prompt tokens were cached")
