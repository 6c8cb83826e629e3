"""The Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jacobiflow.errors import CheckpointError


def import_hub() -> Any:
    """Imports `huggingface_hub`."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            "models on the hub need the package huggingface_hub: pip install 'jacobiflow[cli]'"
        ) from error
    return huggingface_hub


def upload_folder(path: Path, repo_id: str, private: bool | None, token: str | None, **upload: Any) -> str:
    """Creates a repository if it does not exist, uploads a folder to it, and returns the address of the commit."""
    hub = import_hub().HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(hub.upload_folder(repo_id=repo_id, folder_path=str(path), **upload))
