"""Export a checkpoint for OpenVINO GenAI, its weights in 8 or 4 bits. Runs where optimum-intel is
installed.

python bench/make_openvino.py FOLDER OUT int4
"""

import json
import subprocess
import sys
from pathlib import Path

folder, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
command = [
    str(Path(sys.executable).with_name("optimum-cli")),
    "export",
    "openvino",
    "--model",
    str(folder),
]
subprocess.run(
    [*command, "--task", "image-text-to-text", "--weight-format", kind, str(out)], check=True
)
config = json.loads((folder / "preprocessor_config.json").read_text())
size = config["size"]  # GenAI needs the keys of CLIP's processor, else features are NaN
config |= {"crop_size": size, "size": {"shortest_edge": size["height"]}}
(out / "preprocessor_config.json").write_text(json.dumps(config))
