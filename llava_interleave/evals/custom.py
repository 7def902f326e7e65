"""Custom tasks by import path, `module:Task`.

`Task` is a subclass of `evals.task.Task` or a function that returns one; its keyword arguments are
the task's options.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError, with_place
from .task import Task


def load(name: str, options: Sequence[str] = ()) -> Task:
    """The task that `module:Task` makes with `options`, each `key=value`.

    Modules are imported from the working directory too. A value is JSON where it parses as JSON
    (3, true, "3"), else a string. Raises OptionError for a module, an attribute or an option that
    does not exist.
    """
    module_name, _, attribute = name.partition(":")
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.insert(0, working_directory)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise OptionError(
            f"task {name}: {error}; the working directory and installed packages are searched"
        ) from error
    except Exception as error:  # of the module's own code
        raise OptionError(f"task {name}: {with_place(error)}") from error
    make = getattr(module, attribute, None)
    if not callable(make):
        raise OptionError(f"task {name}: {module_name} has no class or function {attribute!r}")
    return build(name, make, options)


def build(name: str, make: Callable[..., object], options: Sequence[str]) -> Task:
    """The task that `make` returns for `options`. Raises `OptionError` for an unknown option."""
    parameters = [
        parameter.name
        for parameter in inspect.signature(make).parameters.values()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise OptionError(f"--task-option takes KEY=VALUE, not {option!r}")
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise OptionError(f"task {name} has no option {key!r}; its options: {known}")
        values[key] = _parsed(value)
    task = make(**values)
    if not isinstance(task, Task):
        raise OptionError(f"task {name} makes a {type(task).__name__}, not a Task")
    return task


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
