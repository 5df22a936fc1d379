"""Runs an exported vision model without gpt4moe: torch, transformers, safetensors and Pillow are enough.

python tools/convert_checkpoint.py to-hf runs/seen exported
python examples/load_vision.py exported --image a.png --prompt "<image>a"
python examples/load_vision.py exported --image a.png --image 0.png,1.png,2.png --prompt "<image>a cat. <image>the"

An --image of several files is a clip. The folder is that of a text model, with a folder vision/ beside it:

  pictures -> vision/encoder -> resampler -> latents -> gated block before every n-th layer of the text model
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import layer_norm, linear, relu, rms_norm, scaled_dot_product_attention, silu
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

Clip = list[Path]
"""Frames; of a still image one."""


class VisionModel:
    """A text model of transformers that sees images. Letters: S tokens, I images, L latents of an image, W their width.

    Raises: ValueError when a tensor is missing or left over.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        vision = folder / "vision"
        self.config = json.loads((vision / "config.json").read_text())
        self.text = _whole(AutoModelForCausalLM, folder, dtype)
        self.encoder = _whole(AutoModel, vision / self.config["encoder"]["folder"], dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None
        self.weights = {
            name: tensor.to(dtype) for file in vision.glob("*.safetensors") for name, tensor in load_file(file).items()
        }
        self.latents = self.media = None  # of the call that runs: [I * L, W], and each token's image, from 1 [S]
        layers = self.text.get_decoder().layers
        for number, layer in enumerate(self.config["layers"]):
            layers[layer].register_forward_pre_hook(self._hook(number))

    def tokens(self, prompt: str) -> Tensor:
        """[S]. Texts between images are encoded by themselves, as they were in training. Raises: ValueError."""
        if self.tokenizer is None:
            raise ValueError("The folder has no tokenizer.json: give token numbers, as logits takes them.")
        parts = prompt.split(self.config["image_token"]) if self.config["image_token"] else [prompt]
        ids = [self.tokenizer(part, add_special_tokens=False).input_ids for part in parts]
        for part in ids[1:]:
            part.insert(0, self.config["image_token_id"])
        return torch.tensor([token for part in ids for token in part])

    @torch.no_grad()
    def logits(self, tokens: Tensor, images: list[Clip], media: Tensor | None = None) -> Tensor:
        """[S, V].

        Args:
            media: of each token, the number of the image it looks at, from 1; 0: none. None: the latest before it.
        """
        self.latents = self.latents_of(images)
        self.media = self.media_of(tokens, len(images)) if media is None else media
        return self.text(tokens.unsqueeze(0), use_cache=False).logits[0]

    @torch.no_grad()
    def generate(self, tokens: Tensor, images: list[Clip], max_new_tokens: int = 32) -> list[int]:
        """The likeliest next tokens, until the end of text."""
        self.latents, self.media = self.latents_of(images), self.media_of(tokens, len(images))
        ends = self.text.generation_config.eos_token_id
        new, cache, given = [], None, tokens
        while len(new) < max_new_tokens:
            out = self.text(given.unsqueeze(0), past_key_values=cache, use_cache=True)
            scores, cache, self.media = out.logits[0, -1], out.past_key_values, self.media[-1:]
            if self.config["image_token_id"] is not None:
                scores[self.config["image_token_id"]] = -torch.inf  # never drawn: no image would belong to it
            given = scores.argmax().view(1)
            if given.item() in (ends if isinstance(ends, list) else [ends]):
                break
            new.append(given.item())
        return new

    def media_of(self, tokens: Tensor, num_images: int) -> Tensor:
        if self.config["image_token_id"] is None and num_images:
            raise ValueError("vision/config.json names no image token: export again with --image-token.")
        is_image = [token == self.config["image_token_id"] for token in tokens.tolist()]
        media = torch.tensor(is_image, dtype=torch.long).cumsum(0)
        if media[-1:].sum() != num_images:
            raise ValueError(f"The prompt has {media[-1:].sum()} image tokens, {num_images} images are given.")
        return media

    def latents_of(self, images: list[Clip]) -> Tensor | None:
        """[I * L, W]. Frames of a clip get time embeddings; a still image none."""
        if not images:
            return None
        made, settings = [], self.config["resampler"]
        for clip in images:
            if len(clip) > settings["max_frames"]:
                raise ValueError(f"A clip has {len(clip)} frames, the model takes {settings['max_frames']}.")
            pixels = torch.stack([self.pixels(path) for path in clip])
            features = self.encoder(pixel_values=pixels).last_hidden_state  # [frames, patches, W]
            if len(clip) > 1:
                features = features + self.weights["perceiver_resampler.time_embeddings"][: len(clip), None]
            made.append(self._resampled(features.flatten(0, 1)))
        return torch.cat(made)

    def pixels(self, path: Path) -> Tensor:
        """[3, side, side]: upright, on white, resized whole, normalised."""
        how = self.config["preprocessing"]
        size, picture = (how["image_size"], how["image_size"]), Image.open(path)
        if picture.format in ("JPEG", "MPO"):
            picture.draft("RGB", (2 * size[0], 2 * size[1]))
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
        small = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        raw = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1)
        mean, deviation = (torch.tensor(how[name]).view(3, 1, 1) for name in ("mean", "std"))
        return ((raw.float() / 255 - mean) / deviation).to(self.text.dtype)

    def _resampled(self, features: Tensor) -> Tensor:
        """[patches, W] -> [L, W]"""
        settings, w = self.config["resampler"], _Names(self.weights, "perceiver_resampler.")

        def norm(x: Tensor, name: str) -> Tensor:
            return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], settings["layer_norm_eps"])

        latents = w["latents"]
        for layer in range(settings["num_layers"]):
            attention, mlp = f"blocks.{layer}.0", f"blocks.{layer}.1"
            normed = norm(latents, f"{attention}.latents_layer_norm")
            seen = torch.cat((norm(features, f"{attention}.context_layer_norm"), normed))
            q, k, v = (
                linear(x, w[f"{attention}.{name}_proj.weight"]).unflatten(-1, (settings["num_attention_heads"], -1))
                for name, x in (("q", normed), ("k", seen), ("v", seen))
            )
            attended = scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
            latents = latents + linear(attended.flatten(1), w[f"{attention}.output_proj.weight"])
            inner = relu(linear(norm(latents, f"{mlp}.ln"), w[f"{mlp}.fc.weight"]))
            latents = latents + linear(inner, w[f"{mlp}.c_proj.weight"])
        return norm(latents, "layer_norm")

    def _hook(self, number: int):
        """What runs before a layer: its first argument goes through gated block `number`."""
        w = _Names(self.weights, f"gated_cross_attn_layers.{number}.")

        def before(module, given):
            hidden = given[0]
            if self.latents is not None:
                hidden = hidden + w["alpha_cross_attn"].tanh() * self._attended(hidden, w)
            normed = self._normed(hidden, w["post_attention_layernorm.weight"])
            inner = silu(linear(normed, w["mlp.gate_proj.weight"])) * linear(normed, w["mlp.up_proj.weight"])
            return (hidden + w["alpha_dense"].tanh() * linear(inner, w["mlp.down_proj.weight"]), *given[1:])

        return before

    def _attended(self, hidden: Tensor, w: "_Names") -> Tensor:
        """hidden [1, S, H] -> the same shape, 0 for tokens that look at no image."""
        query = linear(self._normed(hidden, w["input_layernorm.weight"])[0], w["cross_attn.q_proj.weight"])
        key, value = (linear(self.latents, w[f"cross_attn.{name}_proj.weight"]) for name in "kv")
        q, k, v = (x.unflatten(-1, (-1, self.config["head_dim"])).transpose(0, 1) for x in (query, key, value))
        image = torch.arange(len(self.latents)) // self.config["resampler"]["num_latents"] + 1
        has_image = (self.media > 0).unsqueeze(1)
        out = scaled_dot_product_attention(q, k, v, attn_mask=(self.media.unsqueeze(1) == image) | ~has_image)
        return linear(out.transpose(0, 1).flatten(1) * has_image, w["cross_attn.o_proj.weight"]).unsqueeze(0)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], weight, self.config["rms_norm_eps"])


class _Names:
    """Weights by the end of their name."""

    def __init__(self, weights: dict[str, Tensor], prefix: str):
        self.weights, self.prefix = weights, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.prefix + name]


def _whole(kind, folder: Path, dtype: torch.dtype):
    """transformers fills what is missing with random numbers, and says so in a warning alone."""
    model, found = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True)
    if any(found.values()):
        raise ValueError(f"{folder} does not fit its config.json: {found}")
    return model.eval()


def files_of(given: str) -> Clip:
    return [Path(given)] if Path(given).exists() else [Path(name) for name in given.split(",")]


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("folder", type=Path, help="made by convert_checkpoint.py to-hf")
    command.add_argument(
        "--image", type=files_of, action="append", default=[], help="in the prompt's order; a,b: a clip"
    )
    command.add_argument("--prompt", required=True, help="with <image> where an image stands")
    command.add_argument("--max-new-tokens", type=int, default=32)
    given = command.parse_args()
    try:
        model = VisionModel(given.folder)
        new = model.generate(model.tokens(given.prompt), given.image, given.max_new_tokens)
    except (ValueError, OSError, KeyError, SafetensorError) as error:  # missing or torn: file, name, tensor
        raise SystemExit(f"{given.folder} cannot be run: {type(error).__name__}: {error}") from error
    print(model.tokenizer.decode(new))


if __name__ == "__main__":
    main()
