"""What a file says becomes a dataclass only if every field has its type; the error names the field."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.config.own_files import leads_out, plain_name
from gpt4moe.config.typed import FieldError, from_plain
from gpt4moe.config.yaml_text import load_yaml


@dataclass(frozen=True)
class Part:
    name: str
    share: float = 1.0


@dataclass(frozen=True)
class Whole:
    count: int
    parts: list[Part]
    pairs: Sequence[int] = ()
    by_name: dict[str, Sequence[Part]] = field(default_factory=dict)
    is_good: bool = False
    rest: Mapping[str, Any] | None = None


GOOD: dict[str, Any] = {
    "count": 3, "parts": [{"name": "a"}], "pairs": [1, 2], "by_name": {"x": [{"name": "b", "share": 2}]},
    "is_good": True, "rest": {"any": [None]},
}  # fmt: skip


def test_what_fits_becomes_the_dataclass() -> None:
    assert from_plain(Whole, GOOD) == Whole(3, [Part("a")], (1, 2), {"x": (Part("b", 2),)}, True, {"any": [None]})
    assert from_plain(Whole, {"count": 0, "parts": [], "rest": None}) == Whole(0, [])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"count": "3"}, "count is '3', not a whole number from 0"), ({"count": True}, "count is True"),
        ({"count": -1}, "count is -1"), ({"count": 2**63}, "count is 922"), ({"count": 1.0}, "count is"),
        ({"parts": {}}, "parts is {}, not a list"), ({"parts": [3]}, r"parts\[0\] is 3, not an object"),
        ({"parts": [{}]}, r"parts\[0\].name is missing"), ({"parts": [{"name": None}]}, "name is None, not a text"),
        ({"parts": [{"name": "\ud800"}]}, "not a text"),
        ({"parts": [{"name": "a\0"}]}, "not a text"),
        ({"parts": [{"name": "a", "share": float("nan")}]}, "share is nan, not a finite number"),
        ({"parts": [{"name": "a", "share": True}]}, "share is True"),
        ({"pairs": ["1"]}, r"pairs\[0\] is '1'"),
        ({"by_name": []}, r"by_name is \[\], not an object"), ({"by_name": {"x": None}}, "by_name.'x' is None"),
        ({"is_good": 1}, "is_good is 1, not true or false"), ({"rest": 5}, "rest is 5"), ({"colour": 1}, "unknown key"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(FieldError, match=said):
        from_plain(Whole, GOOD | changed)


@pytest.mark.parametrize("raw", [None, [], 3, "x"])
def test_what_is_no_object_is_refused(raw: object) -> None:
    with pytest.raises(FieldError, match="the whole is"):
        from_plain(Whole, raw)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a/"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str) -> None:
    with pytest.raises(FieldError, match="leads out of the folder"):
        plain_name(name)
    assert plain_name("rank-00000.safetensors") == "rank-00000.safetensors"


def test_a_link_may_lead_within_its_folder_or_into_the_blobs_of_its_cache(tmp_path: Path) -> None:
    """As the hub's library lays a model out: models--a--b/snapshots/REVISION/NAME -> ../../blobs/HASH."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0f3", tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "c0ffee").write_text("{}")
    (tmp_path / "secret").write_text("key")
    links = {"cached": "../../blobs/c0ffee", "own": "cached", "absolute": str(blobs / "c0ffee")}
    out = {"secret": "../../../secret", "other": "../../../models--a--b/../secret", "root": "/etc/hostname"}
    for name, target in (links | out).items():
        (snapshot / name).symlink_to(target)
    (blobs / "chain").symlink_to("../../secret")
    (snapshot / "chain").symlink_to("../../blobs/chain")
    (tmp_path / "linked").symlink_to(snapshot)
    assert [name for name in links if leads_out(snapshot / name)] == []
    assert leads_out(tmp_path / "linked" / "cached") is None
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "older").symlink_to(blobs / "c0ffee")  # as --local-dir linked large files
    assert leads_out(tmp_path / "local" / "older") is None
    assert [name for name in (*out, "chain") if not leads_out(snapshot / name)] == []


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.parametrize("text", ["[" * 50_000, "- " * 50_000, "{a: " * 50_000, "? " * 50_000, LAUGHS, "a: &a [*a]",
                                  "!!python/object/apply:os.system [touch made]", "a: [", "\0", "a: *b"])  # fmt: skip
def test_yaml_that_is_deep_endless_or_code_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        load_yaml(text)


def test_yaml_with_aliases_that_a_dump_writes_is_read() -> None:
    assert load_yaml("a: &x [1, 2]\nb: *x\nc: {d: null}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": None}}
    assert load_yaml("") is None
