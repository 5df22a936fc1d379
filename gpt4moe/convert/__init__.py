"""Room `convert`, storey 5: names and shapes to and from other formats. May import the storeys below
(data, model: names and places of files), never torch.distributed.

rules.py              links: how a tensor of theirs lies in one of ours
tables.py             names, ours and Hugging Face's
architectures.py      which architecture of Hugging Face a model is
hf_config.py          ModelConfig <-> config.json; what is refused
safetensors_file.py   any float type: read, cast, streamed out
conveyor.py           one thread reads, another casts and writes
weights.py            Weights: boxes of logical tensors from any folder
huggingface.py        ours -> Hugging Face; such a folder as Weights
from_huggingface.py   Hugging Face -> ours; dense ones upcycled
inference_grid.py     what each rank of tp x pp holds
inference_layout.py   ours -> one file a rank
inference_reading.py  such a folder as Weights
verify.py             two folders, tensor by tensor; logits
model_files.py        tokenizer, generation settings, model card
prompts.py            a text file -> token ids
command_line.py       the sub-commands of tools/convert_checkpoint.py
command_text.py       sizes like 5GB, answers in lines
publish.py            OUT.partial, renamed at the end
progress.py           bytes and GB/s on stderr
"""
