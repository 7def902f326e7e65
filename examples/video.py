"""Ask about a video with more and more frames, within the context.

python examples/video.py demo/clip.mp4
"""

import sys

from llava_interleave import load

bot = load()
question = "What do you see?"
for frames in (2, 4, 8):
    messages = bot.turn(question, [sys.argv[1]])
    estimate = bot.estimate(messages, frames=frames)
    answer = bot.chat(messages, frames=frames, max_new_tokens=64)
    print(f"{frames} frames, {estimate.total} tokens, {answer.timings.total:.2f} s: {answer}")
