"""Directories, tar and zip files into a store, without a spool."""
