"""Loading a flow from a model folder or the hub, and saving it, under the method names of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.errors import CheckpointError
from jacobiflow.models.checkpoints.folder import (
    CONFIG,
    ModelFolder,
    checkpoint_errors,
    import_hub,
    list_reports,
    write_model,
)
from jacobiflow.models.checkpoints.tensors import build, resolve_dtype
from jacobiflow.models.config import FlowConfig, resolve_rate
from jacobiflow.utils.checks import check_path
from jacobiflow.utils.deprecation import retired
from jacobiflow.utils.warn import warn_caller

if TYPE_CHECKING:
    from typing_extensions import Self


class Pretrained(nn.Module):
    """Base of flows, which are stored in model folders.

    Attributes:
        recommended: The settings that give the best samples.
        classes: The names of the classes; empty without names.
        report_files: The reports in the model folder that the flow was read from.
    """

    model_type: ClassVar[str]
    config_types: ClassVar[tuple[type[FlowConfig], ...]]
    recommended: SamplingSettings = SamplingSettings()
    classes: tuple[str, ...] = ()
    report_files: tuple[Path, ...] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> Self:
        """Loads a bundled model, a folder, or a hub id "owner/name", in eval mode, its parameters with gradients.

        For a hub id, `hub` may be `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.
        """
        check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        folder = ModelFolder.open(pretrained_model_name_or_path, **hub)
        if folder.model_type != cls.model_type:
            raise CheckpointError(f"{folder.path}: a {folder.model_type!r}, not a {cls.__name__}; use jacobiflow.load")
        return cls.from_folder(folder)

    @classmethod
    def from_folder(
        cls, folder: ModelFolder, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
        maps: bool = False,
    ) -> Self:  # fmt: skip
        """Loads the flow of an open folder; `maps` leaves its weights as they are, mapped to their files."""
        config, state = folder.config(cls.config_types), folder.state()
        if folder.classes and len(folder.classes) != config.num_classes:
            raise CheckpointError(
                f"{folder.path / CONFIG}: {len(folder.classes)} names of {config.num_classes} classes; name all, or "
                "leave out classes"
            )
        flow: Any = build(cls, config, state, str(folder.path), device, dtype, maps)
        flow.recommended, flow.report_files = folder.recommended, list_reports(folder.path)
        flow.classes = folder.classes
        for file in sorted(folder.path.glob("tuning*.json")):
            warn_caller(f"{file}: not used, since {retired('tuning')}; call jacobiflow.plan, and remove the file")
        with checkpoint_errors(f"{folder.path / CONFIG}: recommended: "):
            flow.guided(folder.recommended.guidance)
            resolve_rate(config, folder.recommended.denoise)
        return flow

    def save_pretrained(self, save_directory: str | Path, *, dtype: torch.dtype | str | None = None) -> None:
        """Writes a model folder, which replaces an older one once all files are complete.

        The flow's `recommended` settings and the names of its classes go into config.json. Its reports are copied if
        they are of this flow.

        Args:
            dtype: The dtype of the stored weights; by default the flow's own.

        Raises:
            CheckpointError: If a weight is not finite, or the folder has model files that jacobiflow did not write.
        """
        check_path("save_directory", save_directory)
        write_model(self, Path(save_directory), resolve_dtype(dtype))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None,
        dtype: torch.dtype | str | None = None, **upload: Any,
    ) -> str:  # fmt: skip
        """Uploads a model folder, as `save_pretrained` writes it, to the Hugging Face Hub.

        Args:
            repo_id: The repository, "owner/name", which is created if it does not exist.
            token: A token of the hub; by default that of `hf auth login`.
            upload: Arguments of `huggingface_hub.HfApi.upload_folder`, such as `revision` or `commit_message`.

        Returns:
            The address of the commit.
        """
        with TemporaryDirectory() as folder:
            write_model(self, Path(folder), resolve_dtype(dtype), repo_id)
            hub = import_hub().HfApi(token=token)
            repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, **upload))
