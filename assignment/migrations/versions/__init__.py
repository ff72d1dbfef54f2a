"""The revisions of the catalog's tables, one module each. What is released is not changed any more."""
