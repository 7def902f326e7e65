"""A client of `llava serve` without extra packages: upload an image, ask, stream, choose a form.

llava serve &
python examples/serve_client.py demo/shapes.png http://127.0.0.1:8000
"""

import base64
import json
import sys
import urllib.request
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

path, server = Path(sys.argv[1]), sys.argv[2]
data_url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
image = {"type": "image_url", "image_url": {"url": data_url}}


def ask(question: str, **fields: Any) -> HTTPResponse:
    content = [image, {"type": "text", "text": question}]
    body = {"model": "builtin", "messages": [{"role": "user", "content": content}], **fields}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    reply: HTTPResponse = urllib.request.urlopen(request)
    return reply


print(json.load(ask("What is in the image?"))["choices"][0]["message"]["content"])
for line in ask("How many things are there?", stream=True):
    if line.startswith(b"data: {"):
        for choice in json.loads(line[6:])["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
yes_or_no = {"type": "choice", "choice": ["yes", "no"]}
reply = json.load(ask("Is there a star?", response_format=yes_or_no))
print("\n" + reply["choices"][0]["message"]["content"])
