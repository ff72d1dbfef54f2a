"""Object stores: one interface (`Store`), directories and S3 behind it, retries around both. Imports no boto3."""

from desfs.store.base import Answer, CopyRange, Listing, ObjectInfo, S3Options, Store
from desfs.store.url import open_store

__all__ = ["Answer", "CopyRange", "Listing", "ObjectInfo", "S3Options", "Store", "open_store"]
