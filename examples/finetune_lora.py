"""Fine-tune a LoRA adapter on a folder with a sub-folder per class, and ask through it.

python examples/finetune_lora.py photos tuned        # photos/cat/1.jpg, photos/dog/1.jpg, ...
"""

import sys
from pathlib import Path

from llava_interleave import load
from llava_interleave.chat import BUILTIN
from llava_interleave.config import LoraConfig
from llava_interleave.train.recipe import Recipe
from llava_interleave.train.run import run

source, out = Path(sys.argv[1]), Path(sys.argv[2])
recipe = Recipe(
    model=str(BUILTIN),
    source=source,
    question="What is in the picture?",
    adapter=LoraConfig(rank=8, targets=("language_model.*",)),
    steps=int(sys.argv[3]) if len(sys.argv) > 3 else 50,
    lr=1e-3,
    tokens=1024,
    workers=0,
)
run(recipe, out)

bot = load(adapters={"mine": out / "adapter"})
for path in sorted(source.rglob("*.png"))[:3]:
    print(path, bot.ask("What is in the picture?", [path], adapter="mine", max_new_tokens=8))
