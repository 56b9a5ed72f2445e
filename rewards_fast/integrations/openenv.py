"""The PVCP reward as an OpenEnv environment: one episode is one prompt and one answer.

    uvicorn rewards_fast.integrations.openenv:app --port 8000

A client resets with `prompt` and `target`, steps with `{"text": answer}` and gets the reward with its terms.
The settings come from REWARDS_FAST_SETTINGS (a YAML file, see `rewards-fast serve`).
"""

from __future__ import annotations

import os
import uuid
from typing import Any

from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

from rewards_fast.integrations.loops import score_answers, with_prompts
from rewards_fast.pvcp import TERMS
from rewards_fast.settings import LoopSettings, load_settings
from rewards_fast.targets import MissingTargets

MISSING = MissingTargets("openenv")
HINT = "Reset with `target`, or with a prompt that names one."


class CIFAction(Action):
    """An answer: a text, or the messages of a conversation, whose last assistant message is scored."""

    text: str | list[dict[str, Any]]


class CIFObservation(Observation):
    """The prompt after a reset; after a step why the answer does not parse (None where it does) and the
    reward's terms."""

    prompt: str | list[dict[str, Any]] = ""
    reason: str | None = None
    terms: dict[str, float] = {}  # noqa: RUF012, pydantic copies it


class CIFEnvironment(Environment[CIFAction, CIFObservation, State]):
    """Single-turn: `reset(prompt=..., target=...)`, then `step(CIFAction(text=...))` ends the episode with
    its reward."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, settings: LoopSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or LoopSettings()
        self._state = State()
        self._prompt: Any = ""
        self._target: Any = None

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        prompt: str | list[dict[str, Any]] = "",
        target: str | dict[str, float | None] | None = None,
        **others: Any,
    ) -> CIFObservation:
        """Begins an episode. Raises ValueError where the target cannot be read."""
        self._prompt, self._target = prompt, with_prompts([target], [prompt])[0]
        self.settings.scorer().score([], []) if self._target is None else self.settings.scorer().score(
            [""], self._target
        )
        self._state = State(episode_id=episode_id or str(uuid.uuid4()), step_count=0)
        return CIFObservation(prompt=prompt)

    def step(self, action: CIFAction, timeout_s: float | None = None, **others: Any) -> CIFObservation:
        """Scores an answer and ends the episode."""
        self._state.step_count += 1
        scores, _ = score_answers(self.settings, [action.text], [self._target], MISSING, HINT)
        terms = {name: float(getattr(scores, name)[0]) for name in TERMS}
        return CIFObservation(
            prompt=self._prompt,
            done=True,
            reward=float(scores.total[0]),
            reason=scores.reason[0],
            terms=terms,
        )

    @property
    def state(self) -> State:
        return self._state


def make_app(settings: LoopSettings | None = None) -> Any:
    """The environment over HTTP and WebSockets; every session has an environment of its own."""
    return create_app(
        lambda: CIFEnvironment(settings), CIFAction, CIFObservation, env_name="cif", max_concurrent_envs=1024
    )


def __getattr__(name: str) -> Any:
    if name == "app":  # made when a server asks for it
        return make_app(load_settings(os.environ.get("REWARDS_FAST_SETTINGS")))
    raise AttributeError(f"module {__name__!r} has no {name!r}")
