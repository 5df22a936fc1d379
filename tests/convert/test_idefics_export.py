"""to-idefics: a dense vision model as transformers' Idefics, in logits; what Idefics cannot be is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.convert.idefics import require_idefics, to_idefics
from gpt4moe.errors import ConversionError
from gpt4moe.parallel.environment import Environment
from tests.convert.vision_case import DENSE, IMAGE_ID, PARTS, Case, our_logits, pictures, rows_of, their_logits

CLIP = "clip_vision_model"


def test_idefics_loads_strictly_and_gives_our_logits(
    dense: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / "idefics"
    answer = to_idefics(dense, out, dtype="fp32", without_clips=True)
    assert answer["architecture"] == "IdeficsForVisionText2Text" and "time embeddings" in answer["notes"][-1]
    a, b, c, d = pictures(tmp_path_factory.mktemp("pictures"), 4)
    cases = rows_of([[a], [b]], [[b], [a]], [[d], [c], [a]], [])
    *theirs, info = their_logits(out, cases, _idefics)
    assert not any(info.values()), info
    ours = our_logits(dense, IMAGE_ID, cases)
    for number, (own, their) in enumerate(zip(ours, theirs, strict=True)):
        assert np.abs(own - their).max() < 1e-4, number
    assert np.abs(theirs[0] - theirs[1]).max() > 0.01, "other images, other logits"
    assert np.abs(theirs[0]).max() > 0.5


@torch.no_grad()
def _idefics(environment: Environment, folder: Path, cases: list[Case]) -> list[Any]:
    """Logits of each case, then what loading said."""
    from PIL import Image
    from transformers import AutoImageProcessor, IdeficsForVisionText2Text

    model, info = IdeficsForVisionText2Text.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    processor, found = AutoImageProcessor.from_pretrained(folder, use_fast=False), []
    for tokens, images in cases:
        row = torch.tensor([tokens])
        media = (row == IMAGE_ID).cumsum(1)
        mask = (media.unsqueeze(-1) == torch.arange(max(len(images), 1)) + 1).long()
        pixels = torch.zeros(1, 1, 3, 16, 16)
        if images:
            opened = [_on_white(Image.open(path)) for (path,) in images]
            pixels = torch.as_tensor(np.stack(processor(opened))).view(1, len(images), 3, 16, 16)
        found.append(model(input_ids=row, pixel_values=pixels, image_attention_mask=mask).logits[0].numpy())
    return [*found, {key: sorted(map(str, value)) for key, value in info.items()}]


def _on_white(picture: Any) -> Any:
    from PIL import Image

    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


@pytest.mark.parametrize(
    ("override", "kind", "found"),
    [
        (("model.moe=null", "model.ffn_hidden_size=24", "model.num_query_groups=2"), CLIP, "model.num_query_groups=2"),
        (("model.moe=null", "model.ffn_hidden_size=48"), CLIP, "model.vision.ffn_hidden_size=24"),
        (("model.qk_norm=true",), CLIP, "model.qk_norm=true"),
        (("model.head_dim=12",), CLIP, "model.head_dim=12"),
        (("model.num_layers=5",), CLIP, "model.num_layers=5"),
        (("model.vision.resampler.ffn_hidden_size=32",), CLIP, "model.vision.resampler.ffn_hidden_size=32"),
        ((), "siglip_vision_model", "siglip_vision_model.*class token"),
        ((), CLIP, "model.vision.resampler.max_frames=8: .*no time embeddings"),
    ],
)
def test_what_idefics_cannot_be_is_refused_by_its_field(override: tuple[str, ...], kind: str, found: str) -> None:
    small = ("+experiment=tiny", "data=mock", "run.name=t", "model.hidden_size=32")
    model = load_run_config([*small, *DENSE, *PARTS, *override]).model
    with pytest.raises(ConversionError, match=found) as refused:
        require_idefics(model, kind, without_clips=False)
    assert "to-hf" in refused.value.cure
    if "max_frames" in found:
        assert "--without-clips" in refused.value.cure
        require_idefics(model, kind, without_clips=True)
