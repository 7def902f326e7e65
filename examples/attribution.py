"""Which image did the answer use, and where? Writes an HTML report with heat maps.

python examples/attribution.py why.html demo/album-1.png demo/album-2.png demo/album-3.png
"""

import sys

from llava_interleave import load
from llava_interleave.attribution import report

bot = load()
messages = bot.turn("In which image is there a yellow star?", sys.argv[2:])
answer = bot.chat(messages, max_new_tokens=32)
attribution = bot.attribute(messages, answer)
print(answer)
for image in attribution.images:
    print(f"{image.name}: share {image.share:.0%}, attention {image.attention:.0%}")
report.write(sys.argv[1], attribution)
