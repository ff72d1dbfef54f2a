"""Coordination of writers: which day, shard and id a file gets, who may commit a shard, which containers there are."""
