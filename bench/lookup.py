"""What prompt lookup gains and costs with a real language model: SmolLM2-135M in our decoder, answers about a text.

    python bench/lookup.py TEXT [--precision int8] [--tokens 96] [--most 8] [--pieces 8] [--repeat 3]

Pieces of TEXT are asked about: to repeat them, and to say something about them. A JSON line for each kind of question: tokens
written, drafted and accepted, how many of the answers differ from those without guesses (in float32 PyTorch rounds one token
otherwise than several; weights of few bits are computed beside bfloat16, where none differs), and the time of decoding as a share
of the time without; both take turns.
"""

import argparse
import json
from pathlib import Path

import torch
from quality import quantised, smollm2

from llava_interleave.engine import Engine, Request, SamplingParams
from llava_interleave.prompt import Prompt

ASKED = {
    "repeats": "Write this text again, with every sentence in a line of its own:\n\n",
    "says": "What do you think of this? Tell me your own opinion in a few sentences.\n\n",
}
START, END = "<|im_start|>", "<|im_end|>"
PIECE = 800  # characters


def decoding(request: Request) -> float:
    """Seconds from the first token on."""
    took = request.timings(0.0)
    assert took.first_token is not None
    return took.total - took.first_token


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--precision", choices=["float32", "int8", "int4"], default="int8")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    model, words = smollm2()
    if given.precision != "float32":
        model = quantised(model, given.precision)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    words.add_special_tokens([START, END])  # which its vocabulary has as ordinary entries
    end = words.token_to_id(END)
    text = given.text.read_text("utf-8")
    engine = Engine(model, eos_ids={end}, vocab=words.get_vocab_size(), kv_bytes=1 << 30)
    for kind, question in ASKED.items():
        took, used, differ = {0: 0.0, given.most: 0.0}, [0, 0, 0], 0
        for turn in range(given.repeat):
            for index in range(given.pieces):
                piece = text[index * PIECE : (index + 1) * PIECE]
                chat = f"{START}user\n{question}{piece}{END}\n{START}assistant\n"
                prompt, answers = Prompt(words.encode(chat).ids), []
                for most in took:
                    how = SamplingParams(max_new_tokens=given.tokens, prompt_lookup_num_tokens=most)
                    engine.clear()
                    request = engine.generate([prompt], how)[0]
                    took[most] += decoding(request)
                    answers.append(request.generated)
                    if most and not turn:
                        usage = request.usage
                        used = [
                            a + b
                            for a, b in zip(
                                used, (usage.generated, usage.drafted, usage.accepted), strict=True
                            )
                        ]
                differ += answers[0] != answers[1]
        written, drafted, accepted = used
        row = {
            "asked": kind,
            "precision": given.precision,
            "written": written,
            "drafted": drafted,
            "accepted": accepted,
            "differ": differ,
        }
        print(json.dumps(row | {"time": round(took[given.most] / took[0], 3)}), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
