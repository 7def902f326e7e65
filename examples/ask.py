"""Ask one question about images, with or without their places in the text.

python examples/ask.py demo/before.png demo/after.png
"""

import sys

from llava_interleave import load

paths = sys.argv[1:]
bot = load()
print(bot.ask("What is in the first image?", paths))

content = [{"type": "text", "text": "First:"}, {"type": "image", "path": paths[0]}]
for path in paths[1:]:
    content += [{"type": "text", "text": "Next:"}, {"type": "image", "path": path}]
content.append({"type": "text", "text": "How many things are there in the first image?"})
answer = bot.chat([{"role": "user", "content": content}], max_new_tokens=32)
print(answer)
print(answer.usage.prompt, "prompt tokens,", answer.finish_reason)
