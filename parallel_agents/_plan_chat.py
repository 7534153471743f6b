"""The engine of kind ``chat`` in a plan. Needs the extra ``chat``."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from ._checks import is_a
from ._tools import Tool
from .engines.chat import ANSWER_SECONDS, MAX_RETRIES, REPLY_LIMIT_BYTES, ChatEngine, Price


@frozen(kw_only=True)
class ChatTable:
    """Agents that are language models, work in turns and call tools.

    Attributes:
        base_url: The server, such as ``http://127.0.0.1:8080/v1``; an agent's own stands above it.
        model: The model's name; an agent's own stands above it.
        api_key_env: The environment variable that holds the key of ``base_url``, or a table of variables by base URL.
        tools: What agents may call: typed functions, tools or registries, each as ``module:attribute``.
        max_concurrent_tools: The most calls of one turn at the same time; no limit unless given.
        prompt: What agents are asked, with placeholders; description and inputs unless given.
        attach: Names of inputs that are paths of text files, whose text is put below the prompt.
        output_schema: The JSON Schema of outputs; they are text unless given.
        prices: What models cost, by their names; others cost nothing.
        stream: Whether the server is asked to send its answers piece by piece.
        max_retries: How often a request is sent again.
        answer_seconds: A server that sends nothing for so long is given up.
        reply_limit_bytes: The longest answer.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_env: Any = None
    tools: tuple[str, ...] = ()
    max_concurrent_tools: int | None = None
    prompt: str | None = None
    attach: tuple[str, ...] = ()
    output_schema: dict[str, Any] | None = None
    prices: dict[str, Any] = field(factory=dict, validator=is_a(dict, "a table"))
    stream: bool = False
    max_retries: int = MAX_RETRIES
    answer_seconds: float = ANSWER_SECONDS
    reply_limit_bytes: int = REPLY_LIMIT_BYTES

    def engine(self, folder: Path, tools: Iterable[Tool], prices: Mapping[str, Price]) -> ChatEngine:
        """Return the engine; relative paths of files start at *folder*.

        Raises:
            ValueError: A value is out of its range, or something in it is wrong.
            TypeError: A value is of the wrong type.
        """
        return ChatEngine(
            self.base_url,
            self.model,
            api_key_env=self.api_key_env,
            tools=tools,
            max_concurrent_tools=self.max_concurrent_tools,
            prompt=self.prompt,
            attach=self.attach,
            folder=folder,
            output_schema=self.output_schema,
            prices=prices,
            stream=self.stream,
            max_retries=self.max_retries,
            answer_seconds=self.answer_seconds,
            reply_limit_bytes=self.reply_limit_bytes,
        )
