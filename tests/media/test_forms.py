"""Each form of a line gives its texts and images in order; a tag without an image, and the reverse, is told."""

from typing import Any

import pytest

from gpt4moe.errors import DataError
from gpt4moe.media.forms import parts_of

AT = "a.jsonl:3"


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": "<image>A <image> b", "images": ["a.png", ["0.png", "1.png"]]},
         [("a.png",), "A ", ("0.png", "1.png"), " b"]),
        ({"texts": ["A", None, "b", ""], "images": [None, "a.png", None, None], "more": 0}, ["A", ("a.png",), "b"]),
        ({"text_list": ["A.", "B.", "C."], "image_info": [{"image_name": "c.jpg", "matched_text_index": 2},
          {"image_name": "a.jpg", "matched_text_index": 0}], "similarity_matrix": []},
         [("a.jpg",), "A. ", "B. ", ("c.jpg",), "C."]),
        ({"image": "a.png", "caption": " A cat.\n", "url": "http://x"}, [("a.png",), "A cat."]),
        ({"image": "a.png", "text": "A cat."}, [("a.png",), "A cat."]),
        ({"frames": ["0.png", "1.png"], "caption": "A clip."}, [("0.png", "1.png"), "A clip."]),
    ],
)  # fmt: skip
def test_a_line_of_each_form_is_read(row: dict[str, Any], parts: list[Any]) -> None:
    assert parts_of(row, AT) == parts


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([1], "a.jsonl:3 is no JSON object"),
        ({"a": 1}, "has the keys a: no form"),
        ({"text": "a <image> b <image>", "images": ["a.png"]}, "an image tag without an image: 2 times <image> in the"),
        (
            {"text": "a <image> b", "images": ["a.png", "b.png"]},
            "an image without a tag: 1 times <image> in the text,",
        ),
        ({"text": "a", "images": []}, "has no image"),
        ({"text": "<image> ", "images": ["a.png"]}, "has no text"),
        ({"text": None, "images": []}, "text is missing"),
        ({"texts": ["a"], "images": ["a.png", None]}, "1 texts and 2 images"),
        ({"texts": ["a", "b"], "images": ["a.png", None]}, "place 0 has a text and an image"),
        ({"texts": ["see <image>", None], "images": [None, "a.png"]}, "place 0: an image tag without an image"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]}, "index is 1, of 1"),
        ({"image": 3, "caption": "a"}, "its image is int '3'"),
        ({"image": "a.png"}, "its caption is missing"),
        ({"image": "https://x/a.png", "caption": "a"}, "is the address https://x/a.png"),
        ({"frames": [], "caption": "a"}, "its image is list"),
        ({"frames": "a.png", "caption": "a"}, "frames is str 'a.png', no list"),
    ],
)
def test_a_line_that_is_none_is_told_with_its_place(row: Any, told: str) -> None:
    with pytest.raises(DataError) as raised:
        parts_of(row, AT)
    assert told in raised.value.cause and raised.value.cause.startswith(AT)
