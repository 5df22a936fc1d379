"""Prompts and answers as files: jsonl in, jsonl out, one line each, in order, resumed after a kill. No torch.

    prompts  {"id": ..., "prompt": "text"}   or   {"id": ..., "messages": [{"role": ..., "content": ...}]}
             with "images": a file for each tag <image> of the text, or a list of files: the frames of a clip
    answers  {"id", "text", "tokens", "logprobs", "finish_reason"}, and "sample" where a prompt has several
    answers.jsonl.settings.json     what answers follow from: weights, prompts, sampling; not the layout

An answer is one append of a whole line, forced to disk. After a kill the last line may be torn: it is cut off, and the
same command goes on behind the lines that are there. Answers stand in the order of prompts, so their number says where.
Other settings are refused, because one file would hold answers of two kinds.
"""

import fcntl
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.data.lines import read_lines, require_own_ids
from gpt4moe.data.manifest import write_json
from gpt4moe.errors import DataError, LaunchError
from gpt4moe.inference.sight import Clip, clip_of_row

_EXAMPLE = '{"id": 1, "prompt": "text"} or {"id": 1, "messages": [{"role": "user", "content": "text"}]}'


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A line of prompts."""

    id: str | int
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    images: Sequence[Clip] = ()
    """Of the tags, in order."""


def read_prompts(path: Path) -> list[Prompt]:
    """Raises: DataError with the first line that is none."""
    lines = read_lines(path, {"prompt": str}, needed=(), example=_EXAMPLE)
    require_own_ids(path, lines)
    return [_prompt(path, line) for line in lines]


def _prompt(path: Path, line: Mapping[str, Any]) -> Prompt:
    text, messages = line.get("prompt"), line["whole"].get("messages")
    is_chat = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if (text is None) == (messages is None) or not (messages is None or is_chat):
        raise DataError(f"{path}, line {line['line']} has no prompt, no messages, or both.", f"Write {_EXAMPLE}.")
    clips = clips_of_line(f"{path}, line {line['line']}", line["whole"], path.parent)
    return Prompt(id=line["id"], text=text, messages=messages, images=clips)


def clips_of_line(where: str, line: Mapping[str, Any], beside: Path) -> list[Clip]:
    """The images of a prompt's or question's line. Raises: DataError for what is no list of files."""
    images = line.get("images") or []
    if has_image_parts(line.get("messages")):
        raise DataError(
            f"{where} has a part of type image_url in its messages.",
            'Write <image> in the content, and name the file beside it: {"messages": [...], "images": ["a.png"]}.',
        )
    if not isinstance(images, list) or "image" in line:
        has = f"images {images!r}" if images else 'the key "image"'
        raise DataError(f"{where} has {has}.", 'Give a list: {"prompt": "<image>", "images": ["a.png"]}.')
    return [clip_of_row(where, image, beside) for image in images]


def has_image_parts(messages: object) -> bool:
    """Whether a chat has an image as OpenAI's API has them, which a template would print as text."""
    contents = [one.get("content") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and (part.get("type") == "image_url" or "image_url" in part) for part in parts)


class AnswerFile:
    """The answers of one command, open for appending; locked, so that no second command writes into it.

    Args:
        ids: of all answers, in order, a prompt's id once for each of its samples.
        settings: what answers follow from, for JSON; kept beside the file. None: the caller checks them itself.
    Raises: LaunchError when it is in use or cannot be written; DataError when its answers are of other prompts or
        settings.
    """

    def __init__(self, path: Path, ids: Sequence[str | int], settings: Mapping[str, Any] | None = None):
        self.path = path
        try:
            # Not to wait for a reader, if it is a pipe.
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise self._unwritable(error) from error
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            os.close(self.descriptor)
            raise LaunchError(f"{path} is no file that can be resumed.", "Give the name of a file.")
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.descriptor)
            raise LaunchError(f"Another command writes {path}.", "Wait for it, or give another --output.") from error
        self.num_done = self._mend(ids)
        """Answers that are there already."""
        if settings is not None:
            self._keep_settings(settings)

    def _mend(self, ids: Sequence[str | int]) -> int:
        """Cuts off a torn last line. Returns: whole answers."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.ftruncate(self.descriptor, len(whole))
        done = whole.split(b"\n")[:-1]
        for number, (line, wanted) in enumerate(zip(done, ids, strict=False), start=1):
            if _id_of(line) != wanted:
                raise DataError(
                    f"{self.path}, line {number} is not the answer to prompt {wanted!r} of this command.",
                    "Give the prompts that the file was begun with, or another --output.",
                )
        if len(done) > len(ids):
            raise DataError(
                f"{self.path} has {len(done)} answers, this command makes {len(ids)}.",
                "Give the prompts and --num-samples that the file was begun with, or another --output.",
            )
        return len(done)

    def _keep_settings(self, settings: Mapping[str, Any]) -> None:
        beside = _settings_of(self.path)
        if not self.num_done:
            try:
                write_json(beside, settings)
            except OSError as error:
                raise self._unwritable(error) from error
            return
        try:
            before = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path} has {self.num_done} answers, but {beside.name}, which says what they follow from, "
                "is missing or damaged.",
                f"Give another --output, or remove {self.path} to begin again.",
            ) from error
        require_same_settings(self.path, before, settings)

    def read(self) -> list[dict[str, Any]]:
        """The answers that were there already."""
        return [json.loads(line) for line in self.path.read_bytes().split(b"\n")[: self.num_done]]

    def append(self, answers: Sequence[dict[str, Any]]) -> None:
        """Writes whole lines and forces them to disk. Raises: LaunchError when the system refuses."""
        data = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers).encode()
        try:
            while data:
                data = data[os.write(self.descriptor, data) :]
            os.fsync(self.descriptor)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        os.close(self.descriptor)

    def _unwritable(self, error: OSError) -> LaunchError:
        return LaunchError(
            f"{self.path} cannot be written: {error.strerror}.",
            "Give an --output in a folder that is there, with room; the same command then goes on.",
        )


def refuse_other_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """The check of AnswerFile before a model is loaded, which takes minutes. Anything else that is wrong with the file,
    AnswerFile says. Raises: DataError for answers of other settings."""
    if not path.is_file():  # a device could be read for ever
        return
    try:
        with path.open("rb") as file:
            has_answers = file.readline().endswith(b"\n")
        before = json.loads(_settings_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if has_answers:
        require_same_settings(path, before, settings)


def _settings_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def require_same_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises: DataError with the first setting that is not the one that `path` was begun with."""
    now = json.loads(json.dumps(now))  # a tuple comes back as a list
    for name in {**now, **before}:
        if now.get(name) != before.get(name):
            raise DataError(
                f"{path} was begun with {name}={before.get(name)!r}; this command has {now.get(name)!r}.",
                "Give the arguments that it was begun with, or another --output.",
            )


def _id_of(line: bytes) -> object:
    try:
        return json.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        return None
