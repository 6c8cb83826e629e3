"""Notebooks as Markdown, with the outputs and pictures that are stored in them."""

from __future__ import annotations

from pathlib import Path

from nbconvert import MarkdownExporter


def markdown_of(notebook: Path, pictures: Path) -> str:
    """The notebook as Markdown; its pictures are written to the folder `pictures`, which lies beside the page."""
    text, resources = MarkdownExporter().from_filename(
        str(notebook), resources={"output_files_dir": pictures.name, "unique_key": notebook.stem}
    )
    pictures.mkdir(parents=True, exist_ok=True)
    for name, data in resources["outputs"].items():
        (pictures.parent / name).write_bytes(data)
    return str(text)
