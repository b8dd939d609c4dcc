"""The store: consensus per group of rows, placement, overlay, disk and wire. Knows nothing of Nova, SQL or oslo."""
