"""Taking files and days out of a store, under the leases of their shards."""
