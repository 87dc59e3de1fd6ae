"""A conversation with a model: its turns, streamed answers, and a change of adapter in between."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.core.ports import SampleSettings
from tunesmith.core.types import Completion, Message
from tunesmith.data.template import ChatTemplate
from tunesmith.infer.engine import Engine
from tunesmith.infer.generate import How, chat_sampler, prompt_ids, streamed
from tunesmith.model.policy import Policy

FRONTS = 4  # turns whose keys and values are kept: the next prompt begins with one of them


class Talk:
    """One conversation. Turns draw from seeds that follow one another, so that a talk with the same words can be had again.

    An answer that is broken off keeps its words in the talk. Raises what opening and rendering raise.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        template: ChatTemplate,
        settings: SampleSettings,
        *,
        system: str | None = None,
        folders: Mapping[str, str] | None = None,
        int8: bool = False,
    ) -> None:
        how = How(int8=int8, keep_fronts=0 if policy.parameters_by_name() else FRONTS, folders=folders or {})
        self._sampler = chat_sampler(policy, tokenizer, template, how)
        self._tokenizer, self._template = tokenizer, template
        self.settings = settings
        self._system = [Message("system", system)] if system else []
        self.messages = list(self._system)

    def say(self, text: str) -> Generator[str, None, None]:
        """The pieces of the answer to a user's turn; leaving early keeps what was said."""
        messages = [*self.messages, Message("user", text)]
        ids = prompt_ids(messages, self._tokenizer, self._template)
        settings = replace(self.settings, seed=self.settings.seed + len(messages))
        done: Completion | None = None
        said = ""
        pieces = streamed(self._sampler, ids, settings)
        try:
            for piece in pieces:
                said += piece.text
                if piece.text:
                    yield piece.text
                done = piece.done
        except TunesmithError:
            raise  # the talk stays as it was
        except BaseException:
            self.messages = [*messages, Message("assistant", said)]
            raise
        else:
            self.messages = [*messages, Message("assistant", done.text if done is not None else said)]
        finally:
            pieces.close()

    def use(self, adapter: str | None) -> None:
        """Go on with another adapter, or with the base. Raises RecipeError `unknown_adapter`."""
        if adapter is not None and isinstance(self._sampler, Engine):
            self._sampler.adapters.demand(adapter)
        self.settings = replace(self.settings, adapter=adapter)

    def reset(self) -> None:
        """Forget the talk, but for its system message."""
        self.messages = list(self._system)

    @property
    def begun(self) -> bool:
        """Whether anything has been said."""
        return len(self.messages) > len(self._system)

    def undo(self) -> bool:
        """Take back the last turn of user and model; False when there is none."""
        if not self.begun:
            return False
        self.messages = self.messages[:-2]
        return True
