"""The mount: through the kernel, and the stores that its tests stand on."""
