"""Which files are a folder's own: what a manifest or an index may name, and where a link in a download may lead."""

from pathlib import Path

from gpt4moe.config.typed import FieldError


def plain_name(name: object) -> str:
    """The name of a file in its manifest's own folder, returned. Raises: FieldError for a path that leads elsewhere."""
    is_text = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("\\\0")
    if not isinstance(name, str) or not is_text or Path(name).name != name:
        raise FieldError(f"{ascii(name)[:60]} leads out of the folder")
    return name


def leads_out(path: Path) -> str | None:
    """Where a file of a download leads to, if it is a link out of its folder; None: it is the folder's own.

    Files in Hugging Face's cache, models--OWNER--NAME/blobs, are a download's own: snapshots of the cache are links to
    them, and so are the large files of folders that `--local-dir` made before huggingface_hub 0.23. A link to anywhere
    else could bring a file of this machine, a key say, into what is made of the download.
    """
    folder, found = path.parent.resolve(), path.resolve()
    if found.is_relative_to(folder):
        return None
    is_in_cache = found.parent.name == "blobs" and found.parent.parent.name.startswith("models--")
    is_snapshot = folder.parent.name == "snapshots" and found.parent == folder.parent.parent / "blobs"
    return None if is_in_cache or is_snapshot else str(found)
