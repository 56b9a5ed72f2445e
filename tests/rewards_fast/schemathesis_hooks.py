"""What our OpenAPI cannot say, told to schemathesis: a list of targets,
prompts or labels is as long as the texts."""

from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Fits the lists of a right request to each other; wrong requests stay as they are."""
    if case.meta.generation.mode is not GenerationMode.POSITIVE or not isinstance(case.body, dict):
        return
    n = len(case.body.get("texts", case.body.get("query", ())))
    for name, filler in (("targets", None), ("labels", None), ("prompts", "")):
        values = case.body.get(name)
        if isinstance(values, list):
            case.body[name] = (values + [filler] * n)[:n]
