"""Room `convert`, storey 5: checkpoints to and from other formats, without torch.

architectures.py      Hugging Face's architectures, one row each
tables.py             names of tensors, ours and theirs
rules.py              how a tensor of theirs lies in ours
hf_config.py          ModelConfig <-> config.json; what is refused
adapters.py           LoRA: merged into its base
peft_folder.py        LoRA: a folder that PEFT loads
weights.py            Weights: boxes of tensors of any folder
export.py             a folder in Hugging Face format, written
huggingface.py        ours -> Hugging Face; such a folder as Weights
folder_tensors.py     the safetensors files of a folder
vision_tables.py      vision parts: names, ours and Idefics'
vision_folder.py      vision/ of an export: what it has, read
vision_files.py       vision/ of an export: written
vision_import.py      vision/ of an export -> a checkpoint's
encoder_files.py      the image encoder, of a folder or drawn
idefics.py            a vision model -> transformers' Idefics
from_huggingface.py   Hugging Face -> ours; dense ones upcycled
inference_grid.py     what each rank of tp x pp has
inference_layout.py   ours -> one file a rank; as Weights
verify.py             two folders compared: tensors, logits
model_files.py        tokenizer, generation settings, model card
safetensors_file.py   any float type: read, cast, written
copy_pipeline.py      one thread reads, another writes; a bar
publish.py            OUT.partial, renamed at the end
command_line.py       sub-commands of tools/convert_checkpoint.py

May import the rooms below (data, model: names and places of files), never torch.distributed.
"""
