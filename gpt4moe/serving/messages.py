"""Messages of /v1/chat/completions -> one prompt: texts, and images as OpenAI's parts of type image_url.

    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
                                 {"type": "text", "text": "What is it?"}]}
    -> an image token at its place in the content -> the chat template -> tokens, and pixels of each image

Nothing is fetched: an address of another machine would let a client look around behind this one.
"""

from typing import Any

from gpt4moe.errors import ConfigError, DataError
from gpt4moe.inference.pictures import Picture
from gpt4moe.inference.requests import MOST_IMAGES
from gpt4moe.inference.sight import Sight, bytes_of_url
from gpt4moe.serving.bad_request import BadRequest


def read_chat(given: dict[str, Any], sight: Sight) -> tuple[list[int], tuple[Picture, ...]]:
    """The prompt's tokens; its images, whose pixels are in memory. Raises: BadRequest that names the field."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("'messages' must be a list of at least one message.", "messages")
    if sight.words.chat_template is None:
        raise BadRequest(
            "This model has no chat template (tokenizer/chat_template.jinja beside its data's tokenizer.json). "
            "Texts: /v1/completions.",
            "messages",
        )
    images: list[bytes] = []
    plain = [_message(f"messages[{at}]", one, sight, images) for at, one in enumerate(messages)]
    if len(images) > MOST_IMAGES:
        raise BadRequest(f"The messages have {len(images)} images, more than {MOST_IMAGES}.", "messages")
    try:
        text = sight.words.render(plain)
        tokens = sight.encode(text, len(images), is_chat=True, what="The chat")
        return tokens, sight.sent(tokens, images)
    except (ConfigError, DataError) as error:
        raise BadRequest(f"{error.cause} {error.cure}", "messages") from error


def _message(name: str, message: Any, sight: Sight, images: list[bytes]) -> dict[str, str]:
    """With its content as one text; its images are added to `images`."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest(f"'{name}' must be an object with a 'role' and a 'content'.", name)
    other = [key for key, value in message.items() if key not in ("role", "content", "name") and value is not None]
    if other:
        raise BadRequest(f"The field '{name}.{other[0]}' is not supported by this server.", f"{name}.{other[0]}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise _no_content(name)
    text = "".join(_part(f"{name}.content", part, sight, images) for part in parts)
    rest = {"name": message["name"]} if isinstance(message.get("name"), str) else {}
    return {"role": message["role"], "content": text, **rest}


def _part(name: str, part: Any, sight: Sight, images: list[bytes]) -> str:
    if not isinstance(part, dict):
        raise _no_content(name.removesuffix(".content"))
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        if sight.num_tags(part["text"]):
            raise BadRequest(
                f"'{name}' has {sight.token} in its text. Send images as parts of type image_url.", name
            )  # fmt: skip
        return str(part["text"])
    image = part.get("image_url")
    if part.get("type") != "image_url" or not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise _no_content(name.removesuffix(".content"))
    other = [key for key in image if key not in ("url", "detail")]
    if other or image.get("detail") not in (None, "auto"):
        field = other[0] if other else "detail"
        raise BadRequest(f"The field '{name}.image_url.{field}' is not supported by this server. Leave it out.", name)
    try:
        sight.require(f"'{name}'")
        images.append(bytes_of_url(image["url"]))
    except DataError as error:
        raise BadRequest(f"'{name}.image_url.url' cannot be read: {error.cause}. {error.cure}", name) from error
    except ConfigError as error:
        raise BadRequest(f"{error.cause} {error.cure}", name) from error
    return sight.token


def _no_content(name: str) -> BadRequest:
    return BadRequest(
        f"'{name}.content' must be a text, or a list of parts of type text or image_url.", f"{name}.content"
    )
