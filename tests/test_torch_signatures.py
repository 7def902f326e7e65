"""Every call of PyTorch that the GPU path makes fits the signatures of all releases that pyproject
allows.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from tests.helpers.torch_signatures import FILE, FILES, ROOT, Call, binds, calls

DATA = json.loads(FILE.read_text("utf-8"))
CALLS = [call for path in FILES for call in calls(path)]


def test_every_call_binds_in_every_release() -> None:
    assert len(CALLS) > 250
    unknown = sorted({call.name for call in CALLS} - DATA["signatures"].keys())
    assert not unknown, f"run tests/helpers/torch_signatures.py: {unknown}"
    wrong = []
    for call in CALLS:
        for versions, signatures in DATA["signatures"][call.name]:
            if not any(binds(call, one) for one in signatures):
                wrong.append(f"{call.place}: {call.name} in {', '.join(versions)}: {signatures}")
    assert not wrong, "\n".join(wrong)


def test_the_releases_are_those_that_are_allowed() -> None:
    """The oldest is the one that pyproject names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (torch,) = (one for one in project["dependencies"] if one.startswith("torch>="))
    assert DATA["versions"][0].startswith(torch.removeprefix("torch>=").split(",")[0])
    assert len(DATA["versions"]) >= 6


@pytest.mark.parametrize(
    ("signature", "positional", "keywords", "fits"),
    [
        ("a, b=0", 1, ("b",), True),
        ("a, b=0", 0, ("b",), False),
        ("a, b=0", 3, (), False),
        ("a, b=0", 1, ("c",), False),
        ("a, *, c", 1, (), False),
        ("a, *args, **kwargs", 5, ("d",), True),
    ],
)
def test_what_binds(signature: str, positional: int, keywords: tuple[str, ...], fits: bool) -> None:
    assert binds(Call("", "f", positional, keywords, starred=False), signature) == fits


def test_calls_are_found_by_their_full_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "one.py"
    file.write_text(
        "import torch\nimport torch.distributed as dist\nfrom torch.nn.functional import pad as p\n"
        "p(1, value=2)\ntorch.cuda.Stream(0)\ndist.all_reduce(*x)\nother.call()\n"
    )
    monkeypatch.setattr("tests.helpers.torch_signatures.ROOT", tmp_path)
    assert list(calls(file)) == [
        Call("one.py:4", "torch.nn.functional.pad", 1, ("value",), starred=False),
        Call("one.py:5", "torch.cuda.Stream", 1, (), starred=False),
        Call("one.py:6", "torch.distributed.all_reduce", 1, (), starred=True),
    ]
