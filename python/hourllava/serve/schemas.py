# SPDX-License-Identifier: Apache-2.0
"""The bodies that clients send: OpenAI's chat completions, with video, and nothing that would be silently ignored."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from hourllava.model.prompt import is_whole

from .wording import Sampling

LEAST_TEMPERATURE = 0.01  # besides 0; scores that are divided by less may be no numbers any more
# What OpenAI's clients may send though it changes no answer.
_WITHOUT_INFLUENCE = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# What would change the answer, and the values besides null that ask for nothing.
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# Of an answer that a client sends back as it came.
_OF_ANSWERS = frozenset({"moments", "memory", "curve"})
_NOT_IN_ANSWERS: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_calls": ([],),
}


class Body(BaseModel):
    """Types are taken at their word, and a field that is not known is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


def refusal(field: str, why: str) -> PydanticCustomError:
    """What a validator of a whole body raises about one of its fields."""
    return PydanticCustomError("refused", "{why}", {"field": field, "why": why})


def _without(given: Any, harmless: frozenset[str], refused: dict[str, tuple[Any, ...]]) -> Any:
    """A body without what has no influence.

    Raises:
        PydanticCustomError: it holds something that would have some, and is not done here.
    """
    if not isinstance(given, dict):
        return given
    for name, neutral in refused.items():
        value = given.get(name)
        if value is not None and not any(
            value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral
        ):
            raise refusal(name, "it is not supported here; leave it out")
    return {name: value for name, value in given.items() if name not in harmless and name not in refused}


def _of_characters(text: str) -> str:
    """A text that has bytes in UTF-8: JSON may hold halves of characters."""
    if not is_whole(text):
        raise PydanticCustomError("half_character", "it holds half of a character; send whole ones")
    return text


Text = Annotated[str, AfterValidator(_of_characters)]
Name = Annotated[Text, Field(min_length=1)]


class TextPart(Body):
    type: Literal["text"]
    text: Text


class VideoUrl(Body):
    url: Name


class VideoPart(Body):
    """A video: where it comes from, what its memory is called, or both."""

    type: Literal["video_url"]
    video_url: VideoUrl | None = None
    uuid: Name | None = None

    @model_validator(mode="after")
    def _names_a_video(self) -> "VideoPart":
        if self.video_url is None and self.uuid is None:
            raise refusal("video_url", "give the url of a video, or beside it the uuid of one that the server knows")
        return self


class ImageUrl(Body):
    url: Name
    detail: Literal["auto"] | None = None


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


TextContent = Annotated[list[TextPart], BeforeValidator(_as_parts)]
Part = Annotated[TextPart | VideoPart | ImagePart, Field(discriminator="type")]
Content = Annotated[list[Part], BeforeValidator(_as_parts)]


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(Body):
    role: Literal["user"]
    content: Content


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: TextContent

    @model_validator(mode="before")
    @classmethod
    def _as_answered(cls, given: Any) -> Any:
        return _without(given, _OF_ANSWERS, _NOT_IN_ANSWERS)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class Wishes(Body):
    """How an answer is to be written, and how much of a memory it may read."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | list[Text] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    budget: Text | None = None

    @model_validator(mode="after")
    def _can_be_done(self) -> "Wishes":
        if 0 < (self.temperature or 0) < LEAST_TEMPERATURE:
            raise refusal("temperature", f"give 0 for the likeliest words, or {LEAST_TEMPERATURE} and more")
        if len(self.stops()) > 4 or not all(self.stops()):
            raise refusal("stop", "give at most four texts, none of them empty")
        return self

    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self) -> Sampling:
        """The same for the engine: greedy, unless a temperature is given."""
        return Sampling(
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=self.stops(),
        )


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # pads chunks against listeners; it is not done, and changes no answer


class ChatRequest(Wishes):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    evidence: bool = False
    wait: bool = True

    @model_validator(mode="before")
    @classmethod
    def _as_openai_s(cls, given: Any) -> Any:
        return _without(given, _WITHOUT_INFLUENCE, _NOT_HERE)

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "ChatRequest":
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "they are for a stream; ask for one, or leave them out")
        return self

    @property
    def usage_in_stream(self) -> bool:
        """Whether a last chunk counts the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class MemoryRequest(Body):
    """`POST /v1/memories`."""

    url: Name
    name: Name | None = None
    follow: bool = False
    idle: Annotated[float, Field(gt=0, le=86400)] = 30.0
