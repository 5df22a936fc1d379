"""What an export in Hugging Face format (to-hf, to-idefics) consists of, and how it is written. No torch."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.config.checksums import SUMS
from gpt4moe.convert.copy_pipeline import progress_bar
from gpt4moe.convert.model_files import Files, model_card
from gpt4moe.convert.publish import published
from gpt4moe.convert.safetensors_file import BYTES, NewTensor, sharded
from gpt4moe.convert.vision_files import VisionFiles
from gpt4moe.convert.weights import CheckpointWeights

DTYPES = {"bf16": ("BF16", "bfloat16"), "fp32": ("F32", "float32")}
"""Option -> (name in safetensors, name in torch)."""

CARD = "README.md"
"""People write into it."""

Answer = dict[str, Any]
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A folder that is to be written from a checkpoint."""

    source: CheckpointWeights
    config: Json
    """config.json."""
    tensors: list[NewTensor]
    dtype: str
    """Option of DTYPES."""
    max_shard_bytes: int
    files: Files
    """Tokenizer and other small files."""
    licence: str
    notes: list[str]
    vision: VisionFiles | None = None
    """What lies in vision/ beside the model."""
    origin: str = ""
    """Of tensors that are not the checkpoint's: an export that was killed goes on only from the same."""

    def answer(self, out: Path) -> Answer:
        """What the command says of it."""
        code, torch_name = DTYPES[self.dtype]
        sizes = {name: sum(tensor.size_bytes(code) for tensor in part) for name, part in self._shards().items()}
        size = sum(sizes.values())
        sizes |= self.vision.sizes() if self.vision else {}
        return {
            "out": str(out), "architecture": self.config["architectures"][0], "dtype": torch_name,
            "tensors": len(self.tensors), "parameters": size // BYTES[code], "size_bytes": sum(sizes.values()),
            "files": [{"name": name, "size_bytes": size} for name, size in sizes.items()], "notes": self.notes,
        }  # fmt: skip

    def write(self, out: Path) -> None:
        """Raises: ConversionError when `out` exists or cannot be written."""
        code, torch_name = DTYPES[self.dtype]
        shards, size = self._shards(), self.answer(out)["size_bytes"]
        card = model_card(
            self.source.manifest, self.source.run, dtype=torch_name, licence=self.licence, notes=self.notes
        )
        files = self.files | {CARD: card.encode()}
        texts = [hashlib.sha256(content).hexdigest() for content in files.values()]
        counts = {name: len(part) for name, part in shards.items()}
        extra = self.vision.identity() if self.vision else None
        plan = json.dumps(["to-hf", self.config, texts, counts, self.source.block_hashes, extra, self.origin])
        with published(out, plan, size) as draft:
            with progress_bar(f"to {out.name}", size) as advance:
                draft.weights(shards, code, advance)
                if self.vision:
                    self.vision.write(draft, advance)
            draft.json("config.json", self.config)
            for name, content in files.items():
                draft.content(name, content)
            hashed = size - sum(self.vision.sizes().values() if self.vision else ())  # vision/ has its own
            with progress_bar(f"sha256 of {out.name}", hashed) as advance:
                draft.checksums(SUMS, is_deep=False, without=[CARD], advance=advance)

    def _shards(self) -> dict[str, list[NewTensor]]:
        return sharded(self.tensors, DTYPES[self.dtype][0], self.max_shard_bytes)
