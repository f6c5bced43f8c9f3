"""Reading torch distributed checkpoints without running code that they bring along.

torch unpickles `.metadata` freely, so a checkpoint from elsewhere could run anything. A checkpoint of ours holds
tensors only; its index needs a few plain classes, and these are all that the reader here admits.
"""

import io
import pickle
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from modules.errors import UserError

ADMITTED = {
    "builtins": {"set", "frozenset", "slice"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}
"""Module -> names that the index of a checkpoint may refer to."""


class SafeReader(FileSystemReader):
    """A `FileSystemReader` that admits only the classes a checkpoint of tensors needs."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index of the checkpoint.

        Raises:
            UserError: it is damaged, or refers to anything but the admitted classes.
        """
        path = self._get_metadata_path()
        with self.fs.create_stream(path, "rb") as stream:
            content = stream.read()
        try:
            metadata = _Unpickler(io.BytesIO(content)).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"it holds a {type(metadata).__name__}")
        except Exception as error:  # damaged bytes are instructions to pickle, which fail in any way
            raise UserError(f"{path} is damaged or no index of a checkpoint: {error}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ADMITTED.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)
