"""A small world that can be drawn: what the built-in model was trained on and what it knows.

Coloured shapes, digits and letters in the four scenarios of M4-Instruct (single image, several
images, video, views of one scene), with questions in varied wordings and exact answers. Without
PyTorch and without a network.
"""

from .draw import draw, write_video
from .episodes import SCENARIOS, Episode, episode
from .questions import Question, ask

__all__ = ["SCENARIOS", "Episode", "Question", "ask", "draw", "episode", "write_video"]
