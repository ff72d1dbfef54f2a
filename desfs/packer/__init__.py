"""From the spool to the store: batches of files become containers, and each file is deleted only when it is safe."""
