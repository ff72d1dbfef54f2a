"""Making one container out of several: compaction of the open day, sealing of the days that are over."""
