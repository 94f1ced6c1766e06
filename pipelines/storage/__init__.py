"""Access to stored bytes by address, on any registered backend; cheap to import.

`store` has the `Storage` value and the list of backends, one file each; `layout` names the stored folders and files;
`fence` keeps a replaced driver from writing.
"""

from pipelines.storage.backend import Backend, Connection, Entry
from pipelines.storage.errors import (
    ConflictError,
    NotFoundError,
    ShortObjectError,
    StorageError,
    TransientStorageError,
)
from pipelines.storage.fence import Fence, FencedError, fenced
from pipelines.storage.local import SYSTEM_FOLDERS, file_sha256, local_path
from pipelines.storage.rate import Throttling
from pipelines.storage.store import (
    BACKENDS,
    Storage,
    address_forms,
    check_address,
    is_local,
    join,
    split_scheme,
)

__all__ = [
    "BACKENDS",
    "SYSTEM_FOLDERS",
    "Backend",
    "ConflictError",
    "Connection",
    "Entry",
    "Fence",
    "FencedError",
    "NotFoundError",
    "ShortObjectError",
    "Storage",
    "StorageError",
    "Throttling",
    "TransientStorageError",
    "address_forms",
    "check_address",
    "fenced",
    "file_sha256",
    "is_local",
    "join",
    "local_path",
    "split_scheme",
]
